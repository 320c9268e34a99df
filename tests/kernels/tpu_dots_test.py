"""Which products the TPU kernel takes, and that a stack streams when compiled for a TPU."""

import jax.numpy as jnp
import pytest

from jaxopt_compress.kernels.tpu_dots import decoded_dot, fits
from tests import tpu
from tests.kernels.decoded_test import inputs


def test_what_does_not_fit_is_refused():
    x, codes, scale, keywords, _ = inputs("nf4")
    assert fits(x, codes, scale, 128)
    assert not fits(x.astype(jnp.float32), codes, scale, 128)
    assert not fits(x, codes.astype(jnp.int16), scale, 128)
    assert not fits(x, codes[:, :128], scale[:, :128], 128)
    assert not fits(x, codes, scale[:, :1], 128)
    assert not fits(x[:, :384], codes[:384], scale[:3], 128)
    assert not fits(x, codes, jnp.ones((128, 256)), 4)
    x, words, scale, _, _ = inputs("int3")
    assert fits(x, words, scale, 128, bits=3, block=128)
    assert not fits(x, words, scale, 128, bits=3, block=32)
    with pytest.raises(ValueError, match=r"no tiles for x bfloat16\[3, 384\]"):
        decoded_dot(x[:, :384], codes, scale, **keywords)


COMPILE = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import hlo_tools
from jaxopt_compress.kernels.tpu_dots import decoded_dot
from jaxopt_compress.numerics.codebooks import NF4

size, rows = 8192, 1024
sharding = NamedSharding(hlo_tools.tpu_mesh("v5e"), PartitionSpec())
abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
convert = lambda codes: codes.astype(jnp.float32)
for dtype, hlo, group, decode in [
    ("uint4", "u4", 128, NF4.decode), ("float8_e4m3fn", "f8e4m3fn", 32, convert)
]:
    layer = lambda x, w: (decoded_dot(x, *w, decode, group=group).astype(x.dtype), None)
    weights = abstract((4, size, size), dtype), abstract((4, size // group, size), "float32")
    stack = lambda weights, x: jax.lax.scan(layer, x, weights)[0]
    args = weights, abstract((rows, size), "bfloat16")
    text = hlo_tools.compile_for(stack, args, "tpu").as_text()
    assert "tpu_custom_call" in text
    assert hlo_tools.weight_copies(text, size * size, hlo) == [], dtype
"""


@pytest.mark.ci
@tpu.needs_libtpu
def test_stack_streams_on_v5e():
    tpu.python("-c", COMPILE)
