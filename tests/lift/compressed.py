"""Compressed parameters for the models of the zoo, in every form that a leaf can have."""

import functools
import math

import jax
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress.lift import layout_of
from jaxopt_compress.tree import map_named
from tests.models import CASES

_HALF = jc.prune(jc.magnitude(), jc.constant(0.5))

KINDS = {
    "int8": jc.quantize("int8"),
    "int4_groups": jc.quantize("int4", group=8),
    "int4_asymmetric": jc.quantize("int4", symmetric=False),
    "int2_planar": jc.quantize("int2", group=8),
    "sparse": _HALF,
    "two_of_four": jc.prune(jc.magnitude(), jc.constant(0.5), pattern="2:4"),
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
        return _compressed({"w": jax.numpy.asarray(w)}, KINDS[kind], {"w": [use.value]})["w"]
    except ValueError as error:
        assert "'w' of shape" in str(error), error
        return None


def _compressed(params, compression, uses):
    """As `jc.compress`; in one program where sizes do not depend on values, which is faster."""
    init = jax.jit(lambda params: compression.init(params, uses=uses))
    run = lambda params: compression.compress(params, compression.init(params, uses=uses))
    try:
        return jax.jit(run)(params)
    except TypeError:  # Sizes depend on values: not in one program.
        return compression.compress(params, init(params))


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
    return jc.combine(jax.tree.map(lambda x: 1.25 * x, floats), rest)


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
