"""Layer after layer: what is measured behind layers that are compressed already."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.lift.lockstep import WholeWarning
from tests.compression.laws import assert_same_bits
from tests.post_training.layers import BATCHES, CASES, GROUPS, D, normal, recording


@pytest.mark.parametrize("name", ["layers", "indexed", "scanned", "experts"])
def test_each_layer_is_calibrated_behind_the_compressed_ones(name):
    """By definition: with the layers before it compressed, `calibrate` finds the same."""
    fn, params = CASES[name]
    seen = {}
    small = jc.compress_in_order(fn, params, recording(seen), BATCHES, progress=False)
    rounded = jax.tree.map(jnp.round, params)
    jax.tree.map(np.testing.assert_array_equal, small, rounded)
    stacked = not isinstance(params["w"], list)
    assert len(seen["w" if stacked else "w/0"]) == (1 if not stacked or name == "experts" else 4)
    for t in range(4):
        now = jax.tree.map(lambda x: x, params)
        before = range(t + 1, 4) if name == "scanned" else range(t)
        for i in before if name != "experts" else ():
            if stacked:
                now["w"] = now["w"].at[i].set(rounded["w"][i])
            else:
                now["w"][i] = rounded["w"][i]
        path = "w" if stacked else f"w/{t}"
        want = jc.calibrate(fn, now, BATCHES, where=path)[path][0]
        own = seen[path]
        if name == "experts":
            got = jax.tree.map(lambda x, t=t: x[t], own[0])
        else:
            place = 3 - t if name == "scanned" else t
            got = jax.tree.map(lambda x: x[0], own[place]) if stacked else own[0]
        want = jax.tree.map(lambda x, t=t: x[t], want) if stacked else want
        for what in ("second_moment", "mean_magnitude", "low", "high", "rows"):
            a, b = (getattr(s, what) for s in (got, want))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))
    last = jc.calibrate(fn, {**rounded, "out": params["out"]}, BATCHES, where="out")["out"][0]
    np.testing.assert_allclose(seen["out"][0].second_moment, last.second_moment, rtol=1e-4)


@pytest.mark.parametrize("path", ["w", "v", "u", "out"])
def test_entries_that_data_choose_are_calibrated_apart(path):
    """As above: with the parameters before it compressed, `calibrate` finds the same."""
    fn, params = CASES["chosen"]
    seen = {}
    jc.compress_in_order(fn, params, recording(seen), BATCHES, progress=False)
    before = ["w", "v", "u", "out"]
    before = before[: before.index(path)]
    now = {k: jnp.round(v) if k in before else v for k, v in params.items()}
    (want,) = jc.calibrate(fn, now, BATCHES, where=path)[path]
    (got,) = seen[path]
    assert got.rows.shape == params[path].shape[:-2]
    for what in ("second_moment", "mean_magnitude", "low", "high", "rows"):
        a, b = (getattr(s, what) for s in (got, want))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


def test_held_out_statistics_choose():
    fn, params = CASES["scanned"]
    more = [5 * x for x in BATCHES]
    best = jc.best_of(jc.quantize("int2"), jc.quantize("int5"))
    small = jc.compress_in_order(fn, params, best, BATCHES, held_out=more, progress=False)
    assert small["w"].format == small["out"].format == "int5"
    with pytest.raises(ValueError, match="no held-out statistics"):
        jc.compress_in_order(fn, params, best, BATCHES, progress=False)


def test_numbers_in_batches_are_those_of_each_batch():
    fn = lambda p, x, m: (x * m) @ p["w"]
    params = {"w": normal(0, D, D)}
    c = jc.quantize("int8", activations=jc.activations("int8", "calibrated"))
    batches = [(BATCHES[0], 1.0), (BATCHES[0], 100.0)]
    small = jc.compress_in_order(fn, params, c, batches, progress=False)
    assert_same_bits(small, jc.compress(params, c, stats=jc.calibrate(fn, params, batches)))
    static = lambda p, x, flag: x @ p["w"] if flag == "on" else x
    small = jc.compress_in_order(
        static, params, GROUPS, [(x, "on") for x in BATCHES], progress=False
    )
    assert isinstance(small["w"], jc.QuantizedArray)
    with pytest.raises(ValueError, match="batch 1 has the shapes"):
        jc.compress_in_order(static, params, GROUPS, [(BATCHES[0], "on"), (BATCHES[0], "off")])
    with pytest.raises(TypeError, match=r"batches is one array; .* such as \[x\]"):
        jc.compress_in_order(lambda p, x: x @ p["w"], params, GROUPS, BATCHES[0])


def recurrent(params, x):
    """One weight in every iteration."""
    step = lambda h, x: (jnp.tanh(x @ params["in"] + h @ params["w"]), None)
    return jax.lax.scan(step, jnp.zeros((D,)), x)[0] @ params["out"]


def branch(params, x):
    """A weight in a branch."""
    wide = jnp.sum(x) > -1e9
    return jax.lax.cond(wide, lambda: x @ params["w"], lambda: x) @ params["out"]


@pytest.mark.parametrize(("fn", "primitive"), [(recurrent, "scan"), (branch, "cond")])
def test_what_cannot_be_walked_is_calibrated_as_a_whole_and_says_so(fn, primitive):
    params = {k: normal(i, D, D) for i, k in enumerate(("in", "w", "out"))}
    seen = {}
    if fn is branch:
        del params["in"]
    with pytest.warns(WholeWarning, match=f"'{primitive}' is calibrated as a whole, at .*: .*w"):
        jc.compress_in_order(fn, params, recording(seen), BATCHES, progress=False)
    want = jc.calibrate(fn, params, BATCHES, where="w")["w"][0]
    np.testing.assert_allclose(seen["w"][0].second_moment, want.second_moment, rtol=1e-5)
    rounded = {**jax.tree.map(jnp.round, params), "out": params["out"]}
    want = jc.calibrate(fn, rounded, BATCHES, where="out")["out"][0]
    np.testing.assert_allclose(seen["out"][0].second_moment, want.second_moment, rtol=1e-5)


def test_tables_are_compressed_before_they_are_looked_up():
    """So that later layers see their error."""
    params = {"table": 3 * normal(0, 9, D), "w": normal(1, D, D)}
    fn = lambda p, i: p["table"][i] @ p["w"]
    seen = {}
    recipe = {"table": jc.quantize("int2"), "w": recording(seen)}
    ids = [jnp.arange(9)]
    small = jc.compress_in_order(fn, params, recipe, ids, progress=False)
    x = jc.materialize(small)["table"]
    np.testing.assert_allclose(seen["w"][0].second_moment, x.T @ x / 9, rtol=1e-5, atol=1e-6)
