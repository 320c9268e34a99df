"""Exported functions: for several platforms at once, and for any number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxopt_compress as jc
from tests.quantization.cases import normal

FORMS = {
    "int8": jc.quantize("int8"),
    "int4 in groups": jc.quantize("int4", group_size=64),
    "zero points": jc.quantize("uint4", group_size=64, symmetric=False),
    "int3": jc.quantize("int3"),
    "int2": jc.quantize("int2"),
    "nf4": jc.quantize("nf4", group_size=64),
    "int8 x int8": jc.quantize("int8", activations="int8"),
    "int4 in groups x int8": jc.quantize("int4", group_size=64, activations="int8"),
    "low rank": jc.low_rank(rank=4),
}


OTHERS = ("int8", "zero points", "int2", "nf4", "low rank")
KINDS = [pytest.param(name, marks=pytest.mark.slow if name in OTHERS else []) for name in FORMS]


@pytest.mark.ci
@pytest.mark.fast("int8", "int4 in groups", "int3", "int4 in groups x int8", "low rank")
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_rows(name):
    small = jc.compress({"w": jnp.asarray(normal(1024, 320))}, FORMS[name])
    fn = jax.jit(jc.lift(lambda p, x: x @ p["w"], on_fallback="error", pallas=True))
    rows = jax.ShapeDtypeStruct(export.symbolic_shape("b, 1024"), jnp.float32)
    made = export.export(fn, platforms=("cpu", "tpu", "cuda"))(small, rows)
    assert made.platforms == ("cpu", "tpu", "cuda")
    for count in (1, 5, 130):
        x = jnp.asarray(normal(count, 1024, seed=count))
        want = np.asarray(fn(small, x))
        # The same sums, in another order.
        atol = 2.0**-18 * np.abs(want).max()
        np.testing.assert_allclose(jax.jit(made.call)(small, x), want, rtol=0, atol=atol)


@pytest.mark.parametrize("inputs", ["int8", "float8_e4m3fn"])
def test_any_size_of_an_image(inputs):
    """Sizes that other sizes make, of which none may be known to be positive."""

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x[:, 1:-1, 1:-1], p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, image = {"w": jnp.asarray(normal(3, 3, 4, 8))}, jnp.asarray(normal(2, 12, 10, 4))
    c = jc.quantize("int8", activations=inputs)
    small = jc.compress(params, c, uses=jc.uses(fn, params, image))
    lifted = jax.jit(jc.lift(fn))
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 4"), jnp.float32)
    y, want = export.export(lifted)(small, shape).call(small, image), lifted(small, image)
    np.testing.assert_allclose(y, want, rtol=0, atol=2.0**-18 * np.abs(want).max())
