"""Formats that follow each other."""

import jax
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.quantization.cases import assert_same_bits
from tests.quantization.learned import mlp, mlp_params, steady, train

PARAMS = {"w": steady(0, 32, 8), "bias": steady(1, 8)}
STAGES = {
    2: jc.quantize("int8"),
    3: jc.quantize("uint4", group_size=8, symmetric=False),
    5: jc.quantize("binary"),
}


def followed(c, updates, scale=1.1):
    """The parameters and the state after each update, which is compiled once."""
    params, state, update = PARAMS, c.init(PARAMS), jax.jit(c.update)
    yield params, state
    for _ in range(updates):
        params = jax.tree.map(lambda w: w * scale, params)
        state = update(state, params)
        yield params, state
    assert update._cache_size() <= 1


@pytest.mark.ci
@pytest.mark.fast("True")
@pytest.mark.parametrize("pruned", [False, True])
def test_each_update_is_that_of_its_stage(pruned):
    before = [jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))] if pruned else []
    stages = {k: c for k, c in STAGES.items() if not pruned or k < 5}
    c = jc.chain(*before, jc.progressive(stages))
    alone = {k: jc.chain(*before, own) for k, own in stages.items()}
    view = jax.jit(c.apply)
    for count, (params, state) in enumerate(followed(c, 6)):
        begun = [k for k in stages if k <= count]
        small = c.compress(params, state)
        assert_same_bits(jc.materialize(small), view(params, state))
        if begun:
            want = alone[begun[-1]].init(params)
            assert_same_bits(view(params, state), alone[begun[-1]].apply(params, want))
            assert small["w"].format == {2: "int8", 3: "uint4", 5: "binary"}[begun[-1]]
        elif not pruned:
            assert_same_bits(view(params, state), params)


@pytest.mark.parametrize("updates", [1, 2, 4, 5])
def test_derivatives_are_those_of_the_stage(updates):
    stages = {**STAGES, 2: jc.quantize("int8", bounds=jc.bounds.percentile(99.0))}
    c, g = jc.progressive(stages), steady(2, 32, 8)
    *_, (params, state) = followed(c, updates)
    # Outside of the grid that was made for the parameters themselves.
    wide = 2 * params["w"]
    pulled = lambda view: jax.vjp(lambda w: view({**params, "w": w})["w"], wide)[1](g)[0]
    got = pulled(lambda p: c.apply(p, state))
    begun = [k for k in stages if k <= updates]
    if not begun:
        return np.testing.assert_array_equal(got, g)
    own = stages[begun[-1]]
    same = own.init(params)
    np.testing.assert_array_equal(got, pulled(lambda p: own.apply(p, same)))
    assert (0 < np.mean(got == 0) < 1) == (begun[-1] == 2)


@pytest.mark.slow
@pytest.mark.ci
def test_training(tmp_path):
    params, x = mlp_params(), steady(9, 64, 8)
    y = mlp(mlp_params(7), x)
    c = jc.progressive({0: jc.quantize("int8"), 20: jc.quantize("int4"), 40: jc.quantize("int3")})
    tx = jc.compressed_training(optax.adam(1e-2), c)
    params, state, losses = train(c, tx, tx.init(params), params, x, y, steps=60)
    assert losses[-1] < 0.5 * losses[0], losses[::10]
    small = jc.compress(params, c, state=state)
    assert {leaf["w"].format for leaf in small.values()} == {"int3"}
    assert_same_bits(jc.materialize(small), c.view(params, state))
    jc.save(tmp_path / "state", (params, state))
    restored = jc.load(tmp_path / "state", like=(params, state))
    again = [train(c, tx, s, p, x, y, steps=2)[2] for p, s in (restored, (params, state))]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    "stages, message",
    [
        ({}, "updates count from 0"),
        ({-1: jc.quantize("int8")}, r"progressive\(\{-1\}\)"),
        (
            {0: jc.quantize("int8"), 7: jc.lsq("int4")},
            "stage at 7 is not .*quantize of 'w' alone",
        ),
        ({0: jc.quantize("int8", activations="int8")}, "without activations"),
        (
            {0: jc.quantize("int8", backward=jc.backward(residuals="unrounded"))},
            "and backward=",
        ),
        (
            {0: jc.quantize("int8"), 3: jc.quantize("int4", where="bias")},
            "stage at 3 and the first one do not both choose bias, w",
        ),
    ],
)
def test_what_is_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        jc.progressive(stages).init(PARAMS)


def test_a_grid_without_zero_after_pruning():
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.progressive(STAGES)
    )
    with pytest.raises(ValueError, match="'binary' has no code for 0"):
        c.init(PARAMS)


def test_an_eager_update_can_be_donated():
    """Every parameter's state has buffers of its own."""
    c = jc.progressive({0: jc.quantize("int8"), 2: jc.quantize("int4")})
    params = {"a": PARAMS["w"], "b": PARAMS["w"] * 2}
    state = c.update(c.init(params), params)
    state = jax.jit(c.update, donate_argnums=0)(state, params)
    assert [int(x.stage) for x in state.leaves.values()] == [1, 1]
