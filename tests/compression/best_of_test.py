"""`best_of`, and output errors against sums over the rows themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression.output_error import output_error


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def relative(y, want):
    return np.linalg.norm(np.asarray(y) - want) / np.linalg.norm(want)


def two(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


# Rows of the first input that hardly count, and columns of very different size.
SCALES = jnp.array([100.0, 10.0, 1.0, 0.1] * 4)
PARAMS = {"a": normal(0, 16, 8), "b": normal(1, 8, 4) * jnp.array([1.0, 100.0, 0.01, 5.0])}
X = normal(2, 200, 16) * SCALES


def test_output_errors_are_those_of_the_outputs():
    stats = jc.calibrate(two, PARAMS, [X])
    small = jc.compress(PARAMS, jc.quantize("int4"))
    dense = jc.materialize(small)
    hidden = jnp.tanh(X @ PARAMS["a"])
    found = {row["path"]: row for row in jc.report(PARAMS, small, stats)["leaves"]}
    for path, x in (("a", X), ("b", hidden)):
        want = relative(x @ dense[path], x @ PARAMS[path])
        np.testing.assert_allclose(found[path]["output_error"], want, rtol=1e-4)
        assert "worst_output_error" not in found[path]


def test_each_entry_of_a_stack_has_an_error_of_its_own():
    """The error of a small expert is not lost in that of a large one."""
    size = jnp.array([1.0, 1e-3, 1e3])[:, None, None]
    params, x = {"w": normal(0, 3, 8, 4) * size}, normal(1, 3, 50, 8)
    fn = lambda p, x: jnp.einsum("enk,ekm->enm", x, p["w"])
    stats = jc.calibrate(fn, params, [x])
    # One step for all: the small experts are rounded to 0.
    coarse = {"w": jnp.round(params["w"] / 10) * 10}
    row = jc.report(params, coarse, stats)["leaves"][0]
    each = [relative(x[e] @ coarse["w"][e], x[e] @ params["w"][e]) for e in range(3)]
    np.testing.assert_allclose(row["output_errors"], each, rtol=1e-4)
    np.testing.assert_allclose(row["worst_output_error"], max(each), rtol=1e-4)
    assert row["output_error"] < 0.02 < 0.9 < row["worst_output_error"]


def test_entries_that_share_inputs_have_errors_where_the_stack_is_said():
    """Experts that all meet the same rows: uses take their axis for an output."""
    size = jnp.array([1.0, 1e-3])[:, None, None]
    params, x = {"w": normal(0, 2, 8, 4) * size, "b": jnp.ones(4)}, normal(1, 50, 8)
    fn = lambda p, x: jnp.einsum("nk,ekm->enm", x, p["w"]) + p["b"]
    stats = jc.calibrate(fn, params, [x])
    coarse = {"w": jnp.round(params["w"] * 10) / 10, "b": params["b"]}
    row = jc.report(params, coarse, stats, stack={"w": 1})["leaves"][1]
    outputs = [relative(x @ coarse["w"][e], x @ params["w"][e]) for e in range(2)]
    entries = [relative(coarse["w"][e], params["w"][e]) for e in range(2)]
    np.testing.assert_allclose(row["output_errors"], outputs, rtol=1e-4)
    np.testing.assert_allclose(row["errors"], entries, rtol=1e-4)
    assert row["worst_error"] == max(row["errors"]) > 0.9 > 0.1 > row["relative_error"]
    assert "errors" not in jc.report(params, coarse, stats)["leaves"][1]
    with pytest.raises(ValueError, match=r"3 leading axes of 'w' of shape \(2, 8, 4\)"):
        jc.report(params, coarse, stack={"w": 3})


def test_scanned_layers_have_errors_of_their_own():
    params = {"w": normal(0, 3, 4, 4) * jnp.array([1.0, 1e-2, 1e2])[:, None, None]}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    found = jc.uses(fn, params, jnp.ones((2, 4)))
    small = jc.compress(params, jc.quantize("int4"), uses=found)
    row = jc.report(params, small, uses=found)["leaves"][0]
    dense = jc.materialize(small)["w"]
    each = [relative(dense[i], params["w"][i]) for i in range(3)]
    np.testing.assert_allclose(row["errors"], each, rtol=1e-4)


def test_groups_of_a_convolution():
    names = ("NHWC", "HWIO", "NHWC")

    def conv(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=names, feature_group_count=2
        )

    params = {"w": normal(0, 3, 3, 4, 6)}
    x = normal(1, 2, 5, 5, 8) * jnp.array([10.0] * 4 + [0.1] * 4)
    stats = jc.calibrate(conv, params, [x])["w"][0]
    other = {"w": params["w"] + normal(2, 3, 3, 4, 6) * jnp.array([0.01] * 3 + [0.5] * 3)}
    whole = output_error(params["w"], other["w"], stats).whole
    np.testing.assert_allclose(whole, relative(conv(other, x), conv(params, x)), rtol=1e-4)


def test_the_least_error_wins_leaf_by_leaf():
    stats = jc.calibrate(two, PARAMS, [X])
    coarse, fine = jc.quantize("int2"), jc.quantize("int8")
    mixed = {"a": fine, "b": coarse}
    c = jc.best_of(coarse, mixed, stats=stats)
    state = c.init(PARAMS)
    assert state.chosen == {"a": 1, "b": 0}  # Equal errors go to the first.
    small = c.compress(PARAMS, state)
    assert (small["a"].format, small["b"].format) == ("int8", "int2")
    rows = jc.report(PARAMS, small, stats, state)["leaves"]
    assert [row["choice"] for row in rows] == [1, 0]
    for row in rows:
        assert row["choices"][row["choice"]] == pytest.approx(row["output_error"], rel=1e-4)
    assert "choice" in str(jc.report(PARAMS, small, stats, state))


def test_inputs_decide_between_equal_weights_errors():
    """Rounding is best where inputs are small: candidates that differ in which rows they spoil."""
    spoiled = lambda rows: {"a": PARAMS["a"].at[rows].mul(0.5)}
    stats = jc.calibrate(two, PARAMS, [X])["a"][0]
    loud, quiet = (spoiled(jnp.arange(i, 16, 4)) for i in (0, 3))
    errors = [output_error(PARAMS["a"], p["a"], stats).whole for p in (loud, quiet)]
    assert errors[1] < 0.01 < 0.3 < errors[0]


def test_what_is_looked_up_is_compared_by_its_entries():
    model = lambda p, i: p["table"][i] @ p["w"]
    params = {"table": normal(0, 9, 8), "w": normal(1, 8, 4)}
    stats = jc.calibrate(model, params, [jnp.arange(9)])
    c = jc.best_of(jc.quantize("int3"), jc.quantize("int6"), stats=stats)
    assert c.init(params).chosen == {"table": 1, "w": 1}


def test_it_keeps_the_contract_and_trains():
    stats = jc.calibrate(two, PARAMS, [X])
    factors = jc.chain(jc.low_rank(rank=4), jc.quantize("int8"))
    c = jc.best_of({"a": factors, "b": jc.quantize("int2")}, jc.quantize("int4"), stats=stats)
    tx = jc.compressed_training(optax.adam(1e-3), c)
    params, opt_state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, opt_state):
        loss = lambda p: jnp.mean((two(p, X) - 1) ** 2)
        grads = jax.grad(loss)(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(2):
        params, opt_state = step(params, opt_state)
    small = jc.materialize(jc.compress(params, c, state=opt_state))
    view = c.view(params, opt_state)
    for path in params:
        np.testing.assert_array_equal(small[path], view[path])


def test_errors():
    with pytest.raises(ValueError, match="at least one"):
        jc.best_of()
    c = jc.best_of(jc.quantize("int4"), jc.quantize("int8"))
    with pytest.raises(ValueError, match=r"no held-out statistics .* meet 'a': pass"):
        c.init(PARAMS)
    with pytest.raises(ValueError, match="chooses by values"):
        stats = jc.calibrate(two, PARAMS, [X])
        jax.eval_shape(jc.best_of(jc.quantize("int4"), stats=stats).init, PARAMS)
