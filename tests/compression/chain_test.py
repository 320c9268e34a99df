from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

W = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32))
PRUNE = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
NM = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4")
QUANTIZE = jc.quantize("int8")
RANK = jc.low_rank(rank=2)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            PRUNE,
            RANK,
            "chain: low_rank cannot follow prune at 'a/w' of shape .8, 6.: .*zeros would be lost",
        ),
        (QUANTIZE, RANK, r"chain: low_rank cannot follow quantize at 'a/w' of .*chain\(low_rank"),
        (QUANTIZE, QUANTIZE, "chain: quantize cannot follow quantize at 'a/w' of .*second grid"),
        (RANK, RANK, "chain: low_rank cannot follow low_rank at 'a/w' of .*second rank"),
        (jc.chain(PRUNE, QUANTIZE), jc.chain(RANK), "low_rank cannot follow prune at 'a/w'"),
        (jc.chain(RANK, QUANTIZE), QUANTIZE, "quantize cannot follow quantize at 'a/w'"),
        (
            PRUNE,
            jc.quantize("binary"),
            r"follow prune at 'a/w' of shape \(8, 6\): 'binary' has no code",
        ),
        (
            PRUNE,
            jc.dorefa("odd4", activations="uint4"),
            "follow prune at .*: 'odd4' has no code for 0.0",
        ),
        (
            PRUNE,
            jc.quantize("odd4", activations="int8"),
            "follow prune at .*: 'odd4' has no code for 0.0",
        ),
    ],
)
def test_orders_that_cannot_keep_what_came_before_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        jc.compress({"a": {"w": W}}, jc.chain(first, second))


def test_refused_before_anything_is_computed():
    def score(parameter):
        assert isinstance(parameter.value, jax.core.Tracer), "computed"
        return jnp.abs(parameter.value)

    prune = jc.prune(score, jc.schedules.constant(0.5))
    for bad, message in [
        (RANK, "low_rank cannot follow prune at 'w'"),
        (jc.quantize("int4", group_size=3), r"group_size=3 .*'w' of shape \(8, 6\)"),
        (jc.quantize("int4", where="v"), "where='v' matches no leaf; the nearest paths are w"),
    ]:
        with pytest.raises(ValueError, match=message):
            jc.chain(prune, bad).init({"w": W})
        with pytest.raises(
            ValueError, match=message.replace("group_size=3 .*'w'", "group_size=3 .*'[wx]'")
        ):
            jc.compress({"w": W, "x": W}, {"w": jc.chain(prune, bad)})


def test_elements_may_choose_different_leaves():
    params = {"a": W, "b": W}
    small = jc.compress(
        params, jc.chain(jc.low_rank(rank=2, where="a"), jc.quantize("int8", where="b"))
    )
    assert type(small["a"]) is jc.LowRankArray and type(small["b"]) is jc.QuantizedArray


def test_forms_of_the_stored_leaves():
    small = lambda *cs: jc.compress({"w": W}, jc.chain(*cs))["w"]
    for leaf in (small(PRUNE, QUANTIZE), small(QUANTIZE, PRUNE), small(NM, QUANTIZE)):
        assert type(leaf) is jc.QuantizedArray and type(leaf.codes) is jc.SparseArray
    assert small(NM, QUANTIZE).codes.pattern == (2, 4)
    leaf = small(RANK, QUANTIZE)
    assert type(leaf) is jc.LowRankArray
    assert type(leaf.u) is type(leaf.v) is jc.QuantizedArray


def test_needs_a_compression():
    with pytest.raises(ValueError, match="at least one"):
        jc.chain()


class NoState(NamedTuple):
    """Of a compression that decides nothing."""


def elementwise(fn) -> jc.Compression:
    """A compression of one's own, which says nothing of what it keeps."""
    run = lambda params, state, **_: jax.tree.map(fn, jc.materialize(params))
    return jc.Compression(lambda params, **_: NoState(), lambda state, params, **_: state, run, run)


@pytest.mark.parametrize(
    ("first", "broken", "message"),
    [
        (PRUNE, lambda w: w + 1, "has not kept the zeros of prune at 'w' of shape"),
        (NM, lambda w: w + 1, "has not kept the (zeros|n:m) of prune at 'w'"),
        (QUANTIZE, lambda w: 1.01 * w, "has not kept the grid of quantize at 'w'"),
        (RANK, lambda w: w, "has not kept the rank of low_rank at 'w'"),
    ],
)
def test_what_is_kept_is_checked_on_the_result(first, broken, message):
    with pytest.raises(ValueError, match=message):
        jc.chain(first, elementwise(broken)).init({"w": W})


def test_what_is_kept_is_checked_after_an_element_of_ones_own():
    late = jc.chain(PRUNE, elementwise(lambda w: 2 * w), elementwise(lambda w: w + 1))
    with pytest.raises(ValueError, match="has not kept the zeros"):
        late.init({"w": W})
    kept = jc.chain(PRUNE, elementwise(lambda w: 2 * w), QUANTIZE)
    view = kept.apply({"w": W}, kept.init({"w": W}))["w"]
    assert int(jnp.sum(view == 0)) >= 24


def test_ones_own_before_activations_trains_what_is_stored():
    """The view that the loss is taken at goes through each element, as the stored form does."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32)
    fn = jc.lift(lambda p: x @ p["w"])
    c = jc.chain(elementwise(lambda w: 3 * w), jc.quantize("int8", activations="int8"))
    params = {"w": W}
    state = jc.compressed_training(optax.sgd(0.1), c).init(params)
    trained = fn(c.view(params, state))
    np.testing.assert_allclose(trained, fn(jc.compress(params, c, state=state)), rtol=1e-6)
    np.testing.assert_allclose(trained, 3 * x @ W, atol=0.5)


def test_a_second_mask_keeps_the_first():
    c = jc.chain(PRUNE, NM)
    state = c.init({"w": W})
    first, second = (s.leaves["w"].mask for s in state.states)
    assert not bool(jnp.any(second & ~first))
    small = c.compress({"w": W}, state)["w"]
    assert small.pattern == (2, 4)
    np.testing.assert_array_equal(small.materialize(), c.apply({"w": W}, state)["w"])
    moved = c.update(state, {"w": W[::-1]})
    assert not bool(jnp.any(moved.states[1].leaves["w"].mask & ~moved.states[0].leaves["w"].mask))


def test_factors_may_be_pruned():
    c = jc.chain(RANK, PRUNE, QUANTIZE)
    state = c.init({"w": W})
    small = c.compress({"w": W}, state)["w"]
    assert type(small.u.codes) is jc.SparseArray
    np.testing.assert_array_equal(small.materialize(), c.apply({"w": W}, state)["w"])
    got = jax.jit(jc.lift(lambda p: jnp.ones((2, 8)) @ p["w"]))({"w": small})
    np.testing.assert_allclose(got, jnp.ones((2, 8)) @ small.materialize(), rtol=1e-4, atol=1e-5)


def test_the_state_of_another_chain_is_refused():
    c = jc.chain(PRUNE, QUANTIZE)
    with pytest.raises(ValueError, match=r"has 2 parts, and the state holds quantize\('int8'\)"):
        c.apply({"w": W}, QUANTIZE.init({"w": W}))
