"""Products, convolutions, lookups and scans on the stored form of every format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import FORMATS
from tests.lift.compressed import assert_close
from tests.quantization import cases

pytestmark = pytest.mark.xdist_group("quantization_lift")

# Where steps come from; each use of a format has another one.
VARIANTS = ("default", "group", "tile", "bfloat16", "asymmetric", "double")


def conv(image, w):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, w, (1, 1), "SAME", dimension_numbers=names)


def scanned(x, stack):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]


# Name: shape of the weight, the function, shape of the activation.
USES = {
    "matmul": ((64, 8), lambda w, x: x @ w, (5, 64)),
    "transposed": ((8, 64), lambda w, x: x @ w.T, (5, 64)),
    "conv": ((2, 2, 32, 8), lambda w, x: conv(x, w), (2, 4, 4, 32)),
    "einsum": ((4, 32, 8), lambda w, x: jnp.einsum("btd,hdk->bthk", x, w), (2, 3, 32)),
    "heads": ((4, 32, 16), lambda w, x: jnp.einsum("bthd,hdo->bto", x, w), (2, 3, 4, 32)),
    "gather": ((16, 32), lambda w, x: w[jnp.array([[1, 5], [15, 0]])] + x, (32,)),
    "scan": ((3, 32, 32), lambda w, x: scanned(x, w), (2, 32)),
}
# Other orders of the axes of a product.
ALIKE = ("transposed", "heads")


@functools.cache
def given():
    """Inputs, and how the weights are used."""
    rng = np.random.default_rng(0)
    make = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    weights = {use: make(shape) for use, (shape, _, _) in USES.items()}
    inputs = {use: make(shape) for use, (_, _, shape) in USES.items()}
    run = lambda weights: [fn(weights[use], inputs[use]) for use, (_, fn, _) in USES.items()]
    return inputs, jc.uses(run, weights)


def variant_of(name, use):
    """Another one for each use, and for the next format."""
    among = list(cases.variants(name, VARIANTS))
    return among[(list(FORMATS).index(name) + list(USES).index(use)) % len(among)]


def takes(name, use):
    """Every format is multiplied by, and used in a third of the other ways, in turn."""
    at = list(FORMATS).index(name) + list(USES).index(use)
    return use == "matmul" or name in cases.SOME or (at % 3 == 0 and use not in ALIKE)


@functools.cache
def outputs(use):
    """Results on the stored forms of all formats, and on their dense forms."""
    inputs, uses = given()
    shape, fn, _ = USES[use]
    small = {}
    for name in FORMATS:
        if takes(name, use):
            options = cases.options(name, variant_of(name, use))
            small[name] = cases.at_random(cases.form_of(name, options, shape, uses[use]))
    run = lambda weights, x: {name: fn(w, x) for name, w in weights.items()}
    lifted = jc.lift(run, on_fallback="error")
    both = jax.jit(lambda w, x: (lifted(w, x), run(jc.materialize(w), x)))
    return both(small, inputs[use])


@pytest.mark.parametrize(
    ("use", "name"),
    [
        pytest.param(use, name, marks=() if use == "matmul" else pytest.mark.slow)
        for use in USES
        for name in FORMATS
        if takes(name, use)
    ],
)
def test_on_the_stored_form(use, name):
    """Nothing is densified on the way, and outputs are those of the dense weights."""
    got, want = outputs(use)
    assert_close(got[name], want[name])


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "nvfp4"])
def test_attention_over_a_cache(name):
    """Keys and values by `quantize_array`, inside of jit."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 16)), jnp.float32) for n in (1, 12, 12))

    def attention(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    @jax.jit
    def both(q, k, v):
        small = [jc.quantize_array(x, name) for x in (k, v)]
        return jc.lift(attention, on_fallback="error")(q, *small), attention(
            q, *jc.materialize(small)
        )

    got, want = both(q, k, v)
    assert_close(got, want)


@pytest.mark.parametrize("name", ["int8", "uint5", "float8_e5m2", "nf4", "int16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_activations(name, dtype):
    """Weights and activations of 16 bits: as near as a dense product of these."""
    x = given()[0]["matmul"].astype(dtype)
    variant = "asymmetric" if name == "uint5" else "group"
    form = cases.form_of(name, cases.options(name, variant), cases.SHAPE)
    small = cases.at_random(form.replace(dtype=dtype))
    lifted = jc.lift(lambda w, x: x @ w)
    got, view = jax.jit(lambda w, x: (lifted(w, x), w.materialize()))(small, x)
    assert got.dtype == dtype
    x, view = np.asarray(x).astype(float), np.asarray(view).astype(float)
    # The view, the levels and the result are each rounded to `dtype`.
    bound = 3 * float(jnp.finfo(dtype).eps) * (np.abs(x) @ np.abs(view))
    assert (np.abs(np.asarray(got).astype(float) - x @ view) <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_at_the_ends_of_a_dtype_are_those_of_the_stored_weight(dtype, symmetric):
    """No level lies beyond the largest number, where the stored weight would end and a product not.

    Unsigned codes times their steps reach twice as far before zero points take the half away, so
    they are given weights of half that size.
    """
    signs = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (64, 24)))
    for name in ["uint4", "int4", "int8"][symmetric:]:
        for group in (None, 16):
            reach = float(jnp.finfo(dtype).max) / (2 if name.startswith("u") else 1)
            small = jc.compress(
                {"w": (signs * reach).astype(dtype)},
                jc.quantize(name, group_size=group, symmetric=symmetric),
            )
            x = jnp.full((3, 64), 2.0**-10, dtype)
            got = np.asarray(jax.jit(jc.lift(lambda p, x: x @ p["w"]))(small, x), np.float64)
            exact = np.asarray(jc.materialize(small)["w"], np.float64)
            bound = 4 * float(jnp.finfo(dtype).eps) * 64 * 2.0**-10 * np.abs(exact).max()
            assert (np.abs(got - np.asarray(x, np.float64) @ exact) <= bound).all(), (name, group)
            assert np.abs(exact).max() > 0.8 * reach, (name, group)
