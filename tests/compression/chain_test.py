import jax
import jax.numpy as jnp
import numpy as np
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
