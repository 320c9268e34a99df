"""Stochastic rounding: unbiased, decided by the key, new after each update, stored as seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression.states import method_states
from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.numerics.groups import spread_to
from jaxopt_compress.numerics.steps import step_value
from tests.quantization import cases
from tests.quantization.cases import assert_same_bits

pytestmark = [pytest.mark.ci, pytest.mark.xdist_group("quantization_stochastic")]
NAMES = ("int8", "uint4", "ternary", "float6_e2m3fn", "pot4", "nf4")
DRAWS = 256
each = pytest.mark.parametrize("name", NAMES)


def options(name):
    return {"symmetric": False} if name == "uint4" else {}


@functools.cache
def made():
    """A parameter for each format, the views of it under many keys, and the grid."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.standard_normal((32, 16)), jnp.float32) for n in NAMES}
    params = jax.tree.map(lambda w: w.at[::5, ::3].set(0), params)

    def compression(key=None):
        return jc.chain({n: jc.quantize(n, key=key, **options(n)) for n in NAMES})

    def view(key, params):
        c = compression(key)
        return c.apply(params, c.init(params))

    keys = jax.random.split(jax.random.key(0), DRAWS)
    views = jax.jit(jax.vmap(view, (0, None)))(keys, params)
    return params, views, compression().init(params)


def neighbours(name):
    """The levels at and below, and above each entry, as values."""
    params, _, state = made()
    fmt = FORMATS[name]
    (leaf,) = [s.leaves[name] for s in method_states(state) if name in s.leaves]
    w = np.asarray(params[name])
    steps = np.asarray(spread_to(step_value(leaf.scale), leaf.cuts, w.shape), np.float64)
    zero = 0 if leaf.zero is None else np.asarray(leaf.zero, np.float64)
    if cases.is_integer(name) or name == "ternary":
        levels = np.arange(fmt.grid.low, fmt.grid.high + 1.0)
    else:
        codes = jnp.arange(2**fmt.bits).astype(jnp.uint8)
        levels = np.asarray(fmt.grid.decode(codes), np.float64)
        levels = np.unique(levels[np.isfinite(levels) & (np.abs(levels) <= fmt.grid.high)])
    ratio = w / steps + zero
    at = np.clip(np.searchsorted(levels, ratio, "right") - 1, 0, len(levels) - 2)
    inside = (ratio >= levels[0]) & (ratio <= levels[-1])
    return (levels[at] - zero) * steps, (levels[at + 1] - zero) * steps, inside


@pytest.mark.fast("int8", "float6_e2m3fn", "nf4")
@each
def test_one_of_both_neighbours(name):
    params, views, _ = made()
    below, above, inside = neighbours(name)
    views = np.asarray(views[name], np.float64)
    near = lambda level: np.abs(views - level) <= 1e-6 * np.abs(level) + 1e-30
    assert (near(below) | near(above) | ~inside).all()
    # Entries between two levels take both.
    w = np.asarray(params[name])
    middle = inside & (np.abs(w - (below + above) / 2) < 0.3 * (above - below))
    assert near(below).any(0)[middle].all() and near(above).any(0)[middle].all()


@each
def test_unbiased(name):
    params, views, _ = made()
    below, above, inside = neighbours(name)
    gap = above - below
    error = (np.asarray(views[name], np.float64).mean(0) - np.asarray(params[name])) / gap
    # The mean of n draws of two neighbours deviates by at most half a gap over the root of n. Six
    # such deviations: one entry in 10^9.
    deviation = 0.5 / np.sqrt(DRAWS)
    assert np.abs(error[inside]).max() < 6 * deviation
    assert abs(error[inside].mean()) < 6 * deviation / np.sqrt(inside.sum())


@each
def test_zeros_stay(name):
    params, views, _ = made()
    zero = np.asarray(params[name]) == 0
    assert not np.asarray(views[name])[:, zero].any()


def test_the_key_decides():
    params = {"a": jnp.full((32, 16), 0.3).at[0].set(1.0)}
    params["b"] = params["a"]
    view = lambda key: (c := jc.quantize("int3", key=key)).apply(params, c.init(params))
    first, again, other = view(jax.random.key(1)), view(jax.random.key(1)), view(jax.random.key(2))
    assert_same_bits(first, again)
    assert (first["a"] != other["a"]).any()
    # Parameters of the same values are rounded independently.
    assert (first["a"] != first["b"]).any()
    assert_same_bits(view(jax.random.PRNGKey(1)), view(jax.random.PRNGKey(1)))


def test_new_after_each_update():
    params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((32, 16)), jnp.float32)}
    c = jc.quantize("nf4", key=jax.random.key(4))
    update, apply = jax.jit(c.update), jax.jit(c.apply)

    def views(state):
        out = []
        for _ in range(3):
            view = apply(params, state)
            assert_same_bits(jc.materialize(c.compress(params, state)), view)
            out.append(np.asarray(view["w"]))
            state = update(state, params)
        return out

    first, second, third = views(c.init(params))
    assert (first != second).any() and (second != third).any() and (first != third).any()
    for a, b in zip(views(c.init(params)), (first, second, third), strict=True):
        np.testing.assert_array_equal(a, b)


def test_straight_through():
    params = {"w": jnp.asarray(np.random.default_rng(3).standard_normal((32, 16)), jnp.float32)}
    c = jc.quantize("int4", key=jax.random.key(6), symmetric=False)
    state = c.init(params)
    slope = jax.grad(lambda p: jnp.sum(c.apply(p, state)["w"]))(params)["w"]
    view, w = c.apply(params, state)["w"], params["w"]
    step = np.asarray(state.leaves["w"].scale)
    # Clipped is what was rounded beyond the range, and only that.
    assert np.isin(slope, [0, 1]).all() and (np.asarray(slope) == 1).mean() > 0.8
    moved = np.abs(np.asarray(view) - np.asarray(w)) >= step * 1.0001
    assert not np.asarray(slope)[moved].any()
