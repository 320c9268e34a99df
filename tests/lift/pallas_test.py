"""Products in kernels for TPUs: which ones take them, and that they compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jaxopt_compress as jc
from jaxopt_compress.lift import quantized_products
from tests.quantization.cases import normal

# Where XLA would write the dense weight: tables, small floats, words of codes, zero points.
FORMS = {
    "nf4": jc.quantize("nf4", group=128),
    "mxfp4": jc.quantize("mxfp4"),
    "int3": jc.quantize("int3"),
    "uint5": jc.quantize("uint5", symmetric=False),
    "uint6 in groups": jc.quantize("uint6", group=128, symmetric=False),
    "int3 with zero points": jc.quantize("int3", symmetric=False),
    "binary": jc.quantize("binary"),
    "int3 x int8": jc.quantize("int3", inputs="int8"),
    "binary x int8": jc.quantize("binary", inputs="int8"),
}
matmul = lambda params, x: x @ params["w"]


def operands(name):
    w = jnp.asarray(normal(1024, 256), jnp.bfloat16)
    return jc.compress({"w": w}, FORMS[name]), jnp.asarray(normal(16, 1024, seed=1), jnp.bfloat16)


@pytest.mark.parametrize("name", FORMS)
def test_lowered_to_a_kernel(name):
    staged = jax.jit(jc.lift(matmul, pallas=True)).trace(*operands(name))
    text = staged.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    plain = jax.jit(jc.lift(matmul)).trace(*operands(name)).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" not in plain.as_text()


@pytest.mark.parametrize("name", FORMS)
def test_kernels_compute_the_same(name, monkeypatch):
    small, x = operands(name)
    want = jax.jit(jc.lift(matmul))(small, x).astype(jnp.float32)
    on_tpu = lambda forms, default, *args: forms.get("tpu", default)(*args)
    monkeypatch.setattr(quantized_products, "on_each_platform", on_tpu)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(jc.lift(matmul, pallas=True))(small, x)
    assert got.dtype == x.dtype
    # Weights are rounded to bfloat16 in the kernel, of which 1024 add up, and both results.
    scale = np.abs(np.asarray(want)).max()
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=2.0**-7 * scale)
