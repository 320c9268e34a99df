"""What is stored is what was trained with, bit for bit, for every format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.compression.states import method_states
from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.numerics.groups import spread_to
from tests.quantization import cases
from tests.quantization.cases import assert_same_bits, each_format

# What is compiled for a format serves all of its tests.
pytestmark = pytest.mark.xdist_group("quantization_contract")


def normal(seed, shape, dtype):
    del dtype
    return cases.ordinary(seed, shape)


def chosen(which):
    """A variant for each format: the same one, or for each format another one but the first."""
    if which != "in turn":
        return {n: which for n in FORMATS if cases.options(n, which) is not None}
    others = {n: [v for v in cases.variants(n) if v != "default"] for n in FORMATS}
    return {n: among[i % len(among)] for i, (n, among) in enumerate(others.items())}


class Programs:
    """All formats in a variant, and what is compiled: one program is compiled sooner than 37.

    Only for the dtypes of the first turn: over all formats each variant has each dtype.
    """

    def __init__(self, which):
        self.variants = chosen(which)
        self.compression = c = jc.chain({n: cases.quantize(n, v) for n, v in self.variants.items()})
        self.stored = jax.jit(
            lambda params, state: (c.apply(params, state), c.compress(params, state))
        )
        self.materialize = jax.jit(jc.materialize)


@functools.cache
def programs(which):
    return Programs(which)


@functools.cache
def made(which, kind):
    """Parameters of a kind of values, the state, the views and the stored form."""
    run = programs(which)
    params = {name: cases.param(name, variant, kind) for name, variant in run.variants.items()}
    state = run.compression.init(params)
    return params, state, *run.stored(params, state)


@functools.cache
def dense(which, kind):
    """What the stored form stands for."""
    return programs(which).materialize(made(which, kind)[3])


@functools.cache
def eager(which):
    """Views outside of jit."""
    params, state, _, _ = made(which, normal)
    return programs(which).compression.apply(params, state)


# The cross of both takes a minute to compile.
WHICH = [
    "in turn",
    *(pytest.param(v, marks=pytest.mark.slow) for v in cases.MAIN),
]
each_pair = lambda test: pytest.mark.parametrize("which", WHICH)(each_format(test))


def assert_finite(view):
    wrong = int((~np.isfinite(np.asarray(view, np.float32))).sum())
    assert not wrong, f"{wrong} of {view.size} entries are not finite"


def assert_zeros_stay(view, w):
    wrong = int(np.sum(np.asarray(view)[np.asarray(w) == 0] != 0))
    assert not wrong, f"{wrong} zeros are not kept"


@pytest.mark.ci
@each_pair
def test_stored_form_is_the_view(name, which):
    variant = chosen(which).get(name)
    if variant is None:
        assert which == "asymmetric"
        return
    params, state, views, smalls = made(which, normal)
    w, view, small = params[name], views[name], smalls[name]
    assert (view.shape, view.dtype) == (w.shape, w.dtype)
    assert isinstance(small, jc.QuantizedArray) and small.shape == w.shape
    assert_finite(view)
    assert_same_bits(dense(which, normal)[name], view)
    assert_same_bits(eager(which)[name], view, "outside of jit")
    if FORMATS[name].has_zero:
        assert_zeros_stay(view, w)
    assert_near(name, variant, w, view, state)


@pytest.mark.slow
@each_pair
def test_extreme_values(name, which):
    """From subnormals to the largest floats: the same law, and neither NaN nor infinity."""
    if name in chosen(which):
        view = made(which, cases.extreme)[2][name]
        assert_same_bits(dense(which, cases.extreme)[name], view)
        assert_finite(view)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "uint4", "float8_e4m3fn", "nf4", "mxfp4", "nvfp4"])
def test_every_dtype(name):
    """Outside of jit; variants of other steps and of random rounding too."""
    among = cases.variants(name, ("group", "asymmetric", "powers", "double", "stochastic"))
    c = jc.chain({variant: cases.quantize(name, variant) for variant in among})
    state = None
    for turn in range(3):
        params = {variant: cases.param(name, variant, normal, turn) for variant in among}
        # The grid follows the first turn, so that the others are in other dtypes on the same grid.
        state = state or c.init(params)
        views = c.apply(params, state)
        assert_same_bits(jc.materialize(c.compress(params, state)), views, f"turn {turn}")
        for variant, view in views.items():
            assert_finite(view)
            assert_zeros_stay(view, params[variant])


def assert_near(name, variant, w, view, state):
    """No entry is off by more than half of the widest gap between levels, and half a step."""
    fmt = FORMATS[name]
    (leaf,) = [s.leaves[name] for s in method_states(state) if name in s.leaves]
    if fmt.absmean:
        return
    steps = spread_to(steps_of(leaf.scale), leaf.cuts, w.shape)
    gap = widest_gap(name) * np.asarray(steps, np.float64)
    w, v = np.asarray(w).astype(np.float64), np.asarray(view).astype(np.float64)
    # Steps of eight bits may leave the largest values out, by a part of them.
    given = cases.VARIANTS[variant].get("scale_dtype", fmt.scale)
    beyond = {"float8_e8m0fnu": 0.5, "float8_e4m3fn": 2.0**-4, "bfloat16": 2.0**-8}
    slack = np.maximum(np.abs(w), np.abs(v)) * (beyond.get(given, 0) + 2.0**-7)
    # A zero point is rounded, and shifts the grid by up to half a step.
    half = 0.5 if leaf.zero is None else 1.0
    assert (np.abs(v - w) <= half * gap * 1.001 + slack).all()


def widest_gap(name):
    fmt = FORMATS[name]
    if cases.is_integer(name):
        return 1.0
    codes = jnp.arange(2**fmt.bits).astype(jnp.uint8)
    at = np.asarray(fmt.grid.decode(codes), np.float64)
    at = np.unique(at[np.isfinite(at) & (np.abs(at) <= fmt.grid.high)])
    return np.diff(at).max()


@pytest.mark.parametrize("name", ["int8", "int3", "float8_e4m3fn", "binary", "mxfp4"])
def test_same_decisions_under_jit(name):
    among = cases.variants(name, ("group", "asymmetric", "powers"))
    c = jc.chain({variant: cases.quantize(name, variant) for variant in among})
    params = {variant: cases.param(name, variant, normal) for variant in among}
    assert_same_bits(jax.jit(c.init)(params), c.init(params))


def consume(view, x):
    """Float32 uses of a view that a compiler would like to fuse with how it is made."""
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), view)
    return (
        jax.tree.map(lambda w: w + 1, wide),
        jax.tree.map(lambda w: w * x, wide),
        jax.tree.map(lambda w: jnp.full((2, w.shape[0]), x) @ w, wide),
    )


def test_same_bits_whatever_consumes_them():
    """XLA neither carries excess precision into a consumer nor contracts products with sums."""
    params, _, views, small = made("in turn", normal)
    params, views, small = (
        {name: tree[name] for name in cases.SOME} for tree in (params, views, small)
    )
    c = jc.chain({n: cases.quantize(n, programs("in turn").variants[n]) for n in cases.SOME})
    state, x = c.init(params), jnp.float32(1.7)
    want = jax.jit(consume)(views, x)
    assert_same_bits(jax.jit(lambda p, s, x: consume(c.apply(p, s), x))(params, state, x), want)
    assert_same_bits(jax.jit(lambda q, x: consume(jc.materialize(q), x))(small, x), want)
