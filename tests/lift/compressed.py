"""Compressed parameters for the models of the zoo, in every form that a leaf can have."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress.arrays.sparse import sparse_nm
from jaxopt_compress.lift import layout_of
from jaxopt_compress.sparsity.state import PrunedState
from jaxopt_compress.tree import map_named
from tests.models import CASES

_HALF = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))

KINDS = {
    "int8": jc.quantize("int8"),
    "int4_groups": jc.quantize("int4", group_size=8),
    "int4_asymmetric": jc.quantize("int4", symmetric=False),
    "int2_planar": jc.quantize("int2", group_size=8),
    "sparse": _HALF,
    "two_of_four": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4"),
    "low_rank": jc.low_rank(rank=2),
    "pruned_int8": jc.chain(_HALF, jc.quantize("int8")),
    "low_rank_int8": jc.chain(jc.low_rank(rank=2), jc.quantize("int8")),
}

BY_NAME = {case.name: case for case in CASES}


@functools.cache
def made(name):
    """``(fn, params, args, uses)`` of a case."""
    fn, params, args = BY_NAME[name].make()
    return fn, params, args, jc.uses(fn, params, *args)


@functools.cache
def _leaf(kind, shape, layout, use):
    """One compressed leaf; its values depend on its shape only, so that cases share the work."""
    del layout
    w = np.random.default_rng(math.prod(shape)).normal(size=shape).astype("float32") / 4
    try:
        return _compressed(w, KINDS[kind], use.value)
    except ValueError as error:
        assert "'w' of shape" in str(error), error
        return None


def _compressed(w, compression, use):
    """As `jc.compress`, in one program; but masks are drawn, since a search compiles slowly."""
    init = lambda w: compression.init({"w": w}, uses={"w": [use]})
    try:
        return jax.jit(lambda w: compression.compress({"w": w}, init(w))["w"])(w)
    except TypeError:  # The form of what is pruned depends on values.
        state = jax.tree.map(_drawn, jax.eval_shape(init, w), is_leaf=_is_mask)
    (mask,) = filter(_is_mask, jax.tree.leaves(state, is_leaf=_is_mask))
    if mask.pattern is not None:
        store = jax.jit(sparse_nm, static_argnums=(2, 3, 4))
        return store(w, mask.mask, *mask.pattern, mask.axis)
    return compression.compress({"w": jnp.asarray(w)}, state)["w"]


def _is_mask(x):
    return isinstance(x, PrunedState)


def _drawn(x):
    """Values for the shapes of a state: masks, and positive scales."""
    if _is_mask(x):
        return dataclasses.replace(x, mask=_half(x), threshold=None)
    return jnp.asarray(np.random.default_rng(0).uniform(0.005, 0.02, x.shape), x.dtype)


def _half(state):
    """A mask that keeps half of the entries of each group, or of each entry of a stack."""
    shape, rng = state.mask.shape, np.random.default_rng(0)
    if state.pattern is None:
        rows = np.zeros((*shape[: state.stack], math.prod(shape[state.stack :])), bool)
        rows[..., : rows.shape[-1] // 2] = True
        return jnp.asarray(rng.permuted(rows, axis=-1).reshape(shape))
    n, m = state.pattern
    *lines, length = np.moveaxis(np.empty(shape), state.axis, -1).shape
    groups = np.broadcast_to(np.arange(m) < n, (*lines, -(-length // m), m))
    mask = rng.permuted(groups, axis=-1).reshape(*lines, -1)[..., :length]
    return jnp.asarray(np.moveaxis(mask, -1, state.axis))


class _Ignored:
    """Any value, left out of a cache's key."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


def small_params(name, kind):
    """The parameters of a case, those with a use compressed unless that is refused by its name."""
    _, params, _, uses = made(name)
    count = 0

    def leaf(path, w):
        nonlocal count
        found = uses.get(path)
        if not found:
            return w
        layout = layout_of(found)
        main = max(found, key=lambda u: (u.op != "gather", u.flops or 0))
        small = _leaf(kind, tuple(w.shape), layout, _Ignored(main))
        count += small is not None
        return w if small is None else small

    small = map_named(leaf, params)
    assert count, f"{kind} compresses no leaf of {name}"
    return small


def rescaled(small):
    """The same tree with other values."""
    floats, rest = jc.partition(small)
    # By NumPy, which compiles nothing.
    return jc.combine(jax.tree.map(lambda x: jnp.asarray(1.25 * np.asarray(x)), floats), rest)


@jax.jit
def _dense(leaf):
    return leaf.materialize()


def materialize(small):
    """As `jc.materialize`, compiled once per form and shape of a leaf; the bits are the same."""
    is_small = lambda x: hasattr(x, "materialize")
    return jax.tree.map(lambda x: _dense(x) if is_small(x) else x, small, is_leaf=is_small)


def assert_close(got, expected, scale=2e-5):
    """Equal up to the order of summation.

    A float32 sum of k terms in another order differs by some sqrt(k) units in the last place of its
    largest partial sum; with up to 144 terms and a few layers that is below 170 units, 2e-5, of the
    largest entry.
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a, b)
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        np.testing.assert_allclose(a, b, rtol=0, atol=scale * max(np.abs(b).max(initial=0), 1e-3))
