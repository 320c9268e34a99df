"""Quantization after pruning and before it: what is pruned stays zero, whatever code 0 means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.arrays import SparseArray
from jaxopt_compress.numerics.formats import FORMATS
from tests.lift.compressed import assert_close
from tests.quantization import cases
from tests.quantization.cases import assert_same_bits

pytestmark = [pytest.mark.ci, pytest.mark.xdist_group("quantization_sparse")]
HALF = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
WITHOUT = [name for name, fmt in FORMATS.items() if not fmt.has_zero]
# With a zero point, or in a table, code 0 is another value than 0.
ASYMMETRIC = ("uint4", "uint3", "int5")
ORDERS = {
    "prune first": ("int8", "nf4", "float8_e4m3fn", "float6_e2m3fn", "pot3", "nvfp4"),
    "quantize first": ("nf4", "mxfp4", *WITHOUT),
}
ORDERS = {order: (*names, *ASYMMETRIC) for order, names in ORDERS.items()}


def params_of(names):
    make = lambda seed: np.random.default_rng(seed).standard_normal(cases.SHAPE)
    return {name: jnp.asarray(make(i), jnp.float32) for i, name in enumerate(names)}


@functools.cache
def made(order):
    """Parameters under a mask: the masks, their views and what is stored."""
    rules = {n: cases.quantize(n, symmetric=n not in ASYMMETRIC) for n in ORDERS[order]}
    # The noise belongs to the dense shape, so that stored codes are those of the view.
    rules["int5"] = jc.quantize("int5", symmetric=False, key=jax.random.key(5))
    c = jc.chain(HALF, rules) if order == "prune first" else jc.chain(rules, HALF)
    params = params_of(ORDERS[order])
    state = c.init(params)
    masks = state.states[0 if order == "prune first" else 1].leaves
    return masks, c.apply(params, state), c.compress(params, state)


@pytest.mark.ci
@pytest.mark.fast(
    "prune first-int8",
    "prune first-nf4",
    "prune first-float6_e2m3fn",
    "prune first-nvfp4",
    "prune first-uint3",
    "quantize first-binary",
    "quantize first-mxfp4",
    "quantize first-uint4",
    "quantize first-int5",
)
@pytest.mark.parametrize(
    ("order", "name"), [(order, name) for order, names in ORDERS.items() for name in names]
)
def test_the_view_is_what_is_stored(order, name):
    masks, views, smalls = made(order)
    small, view, mask = smalls[name], views[name], masks[name].mask
    assert isinstance(small, jc.QuantizedArray) and isinstance(small.codes, SparseArray)
    assert_same_bits(small.materialize(), view)
    assert mask.sum() == mask.size / 2
    assert not np.any(np.asarray(view)[~np.asarray(mask)])
    # Only the kept codes are stored, and a bit per entry.
    kept = mask.size // 2 * FORMATS[name].bits // 8 + mask.size // 8
    assert small.nbytes == kept + jc.nbytes([small.scale, small.zero])


@pytest.mark.parametrize("name", ["nf4", "binary", "uint3"])
def test_products(name):
    """Where code 0 is another value than 0, what was pruned adds nothing all the same."""
    small = made("quantize first")[2][name]
    x = jnp.asarray(np.random.default_rng(9).standard_normal((5, 64)), jnp.float32)
    multiply = lambda w, x: x @ w
    assert_close(jax.jit(jc.lift(multiply))(small, x), multiply(small.materialize(), x))


@pytest.mark.parametrize("name", WITHOUT)
def test_pruning_before_a_format_without_zero(name):
    """Refused by name, or zeros stay zeros: an entry that was pruned is never a level."""
    params = {"layer": {"w": params_of(["int8"])["int8"]}}
    c = jc.chain(HALF, jc.quantize(name))
    try:
        state = c.init(params)
    except ValueError as error:
        assert "'layer/w' of shape (64, 8)" in str(error) and repr(name) in str(error)
        return
    view = c.apply(params, state)
    assert_same_bits(jc.materialize(c.compress(params, state)), view)
    mask = state.states[0].leaves["layer/w"].mask
    assert not np.any(np.asarray(view["layer"]["w"])[~np.asarray(mask)])


@pytest.mark.parametrize("name", ["nf4", "nvfp4"])
def test_two_of_four(name):
    """A pattern is kept, and codes under it are stored with it."""
    params = {"w": params_of(["int8"])["int8"]}
    pattern = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4")
    c = jc.chain(pattern, jc.quantize(name))
    state = c.init(params)
    small = c.compress(params, state)["w"]
    assert small.codes.pattern == (2, 4)
    view = c.apply(params, state)["w"]
    assert_same_bits(small.materialize(), view)
    assert_same_bits(jax.jit(c.apply)(params, state)["w"], view)
    assert_same_bits(jax.jit(lambda q: q.materialize())(small), view)
    kept = (np.asarray(view) != 0).reshape(16, 4, 8).sum(1)
    assert kept.max() <= 2
