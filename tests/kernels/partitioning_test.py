"""Kernels for GPUs on arrays that are split over devices, step by step on CPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_compress.kernels.gpu_dots import decoded_dot, integer_dot
from tests.kernels.decoded_test import convert, inputs

SPLITS = {
    "columns": (P("data"), P(None, "model"), P("data", "model"), ()),
    "K": (P("data", "model"), P("model"), P("data"), ("all-reduce",)),
    "K, of rows that are whole": (P("data"), P("model"), P("data"), ("all-reduce",)),
    "both": (P(), P("data", "model"), P(None, "model"), ("all-reduce",)),
    "rows": (P("data"), P(), P("data"), ()),
}


def run(product, arrays, specs):
    """`product` of arrays that are split so: its result, and the collectives it takes."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    arrays = [put(a, spec) for a, spec in zip(arrays, specs, strict=True)]
    fn = jax.jit(product)
    text = fn.lower(*arrays).compile().as_text()
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    return fn(*arrays), tuple(k for k in kinds if f" {k}(" in text)


@pytest.mark.parametrize(
    "name", ["nf4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mxfp6", "int3"))]
)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.fast(
    "-K-mxfp6",
    "-both-int3",
    "-rows-nf4",
    "transposed-K-int3",
    "-K, of rows that are whole-nf4",
)
def test_parts_stay_where_they_are(name, split, transposed):
    x, codes, scale, keywords, _ = inputs(name, rows=6, depth=1024)
    of_x, of_w, of_y, collectives = SPLITS[split]
    if transposed:
        codes, scale, keywords["transposed"] = codes.mT, scale.mT, True
        of_w = P(*reversed((*of_w, None, None)[:2]))
    product = functools.partial(decoded_dot, **keywords, interpret=True)
    y, found = run(product, (x, codes, scale), (of_x, of_w, of_w))
    assert found == collectives
    assert y.sharding.spec == of_y
    want = product(x, codes, scale)
    # Sums of 1024 products in another order.
    np.testing.assert_allclose(y, want, rtol=0, atol=2.0**-15 * float(jnp.abs(want).max()))


def test_one_step_per_column_is_whole_in_each_part_of_k():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 512)), jnp.bfloat16)
    codes = jnp.asarray(rng.integers(-8, 8, size=(512, 64)), jnp.int4)
    scale = jnp.asarray(rng.uniform(1, 2, size=(1, 64)), jnp.float32)
    product = functools.partial(decoded_dot, decode=convert, group=512, interpret=True)
    y, found = run(product, (x, codes, scale), (P(None, "model"), P("model"), P()))
    assert found == ("all-reduce",)
    want = product(x, codes, scale)
    bound = 2.0**-15 * float(jnp.abs(want).max())
    np.testing.assert_allclose(y, want, rtol=0, atol=bound)
    product = functools.partial(product, transposed=True)
    y, found = run(product, (x, codes.mT, scale.mT), (P(None, "model"), P(None, "model"), P()))
    assert found == ("all-reduce",)
    np.testing.assert_allclose(y, want, rtol=0, atol=bound)


def test_integers_and_batches():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, size=(2, 4, 512)), jnp.int8)
    codes = jnp.asarray(rng.integers(-8, 8, size=(2, 512, 64)), jnp.int4)
    scale = 2.0 ** jnp.asarray(rng.integers(-3, 3, size=(2, 4, 64)), jnp.float32)
    product = functools.partial(integer_dot, group=128, interpret=True)
    specs = P("data", None, "model"), P("data", "model"), P("data", "model")
    y, found = run(product, (x, codes, scale), specs)
    assert found == ("all-reduce",)
    np.testing.assert_array_equal(y, product(x, codes, scale))


@pytest.mark.slow
@pytest.mark.parametrize("name, spec", [("nf4", P("model")), ("int3", P(None, "model"))])
def test_what_the_kernel_does_not_take_is_gathered(name, spec):
    """Half of a group, and 32 columns."""
    x, codes, scale, keywords, _ = inputs(name, depth=256, columns=128)
    product = functools.partial(decoded_dot, **keywords, interpret=True)
    steps = P(*spec) if spec[0] is None else P()
    y, found = run(product, (x, codes, scale), (P(), spec, steps))
    assert "all-gather" in found
    np.testing.assert_array_equal(y, product(x, codes, scale))
