"""Captured activations, against models that return them by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.models.case import normal

PARAMS = {"in": {"kernel": normal(0, 4, 6), "bias": normal(1, 6)}, "layers": normal(2, 3, 6, 6) / 3}
X = normal(3, 5, 4)


@jax.custom_vjp
def halved(w, x):
    return jnp.tanh(x @ w)


halved.defvjp(
    lambda w, x: (halved(w, x), (w, x)),
    # Half of the derivatives, to tell this rule from that of the operations.
    lambda saved, g: tuple(d / 2 for d in jax.vjp(lambda w, x: jnp.tanh(x @ w), *saved)[1](g)),
)


def model(params, x):
    """Scan, remat and jit around products; returns its intermediates as well."""
    hidden = x @ params["in"]["kernel"]

    @jax.checkpoint
    def body(x, w):
        y = jax.jit(jnp.matmul)(x, w)
        return jnp.tanh(y), (x, y)

    out, (inputs, outputs) = lax.scan(body, hidden + params["in"]["bias"], params["layers"])
    return out, {"in/kernel": ([x], [hidden]), "layers": ([inputs], [outputs])}


def alone(params, x):
    return model(params, x)[0]


def same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("i, what", [(0, "input"), (1, "output")])
def test_captures_escape_scan_remat_and_jit(i, what):
    output, by_hand = model(PARAMS, X)
    got = jax.jit(jc.capture(alone, at=["*/kernel", "layers"], what=what))(PARAMS, X)
    want = {path: pair[i] for path, pair in by_hand.items()}
    assert jax.tree.structure(got) == jax.tree.structure((output, want))
    same(got, (output, want))
    assert got[1]["layers"][0].shape == (3, 5, 6)


@pytest.mark.parametrize("i, what", [(0, "input"), (1, "output")])
def test_gradients_flow_through_captures(i, what):
    square = lambda tree: sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(tree))
    run = jc.capture(alone, at="layers", what=what)

    def by_hand(params, x):
        out, found = model(params, x)
        return square(out) + square(found["layers"][i])

    got = jax.grad(lambda p, x: square(run(p, x)), (0, 1))(PARAMS, X)
    same(got, jax.grad(by_hand, (0, 1))(PARAMS, X))


def test_maps_over_examples_and_over_models():
    stacked = jax.tree.map(lambda x: jnp.stack([x, -x]), PARAMS)
    run = jc.capture(alone, at="layers")
    by_hand = lambda params, x: model(params, x)[1]["layers"][1][0]
    got = jax.vmap(run, (None, 0))(PARAMS, X)[1]["layers"][0]
    same(got, jax.vmap(by_hand, (None, 0))(PARAMS, X))
    got = jax.vmap(run, (0, None))(stacked, X)[1]["layers"][0]
    same(got, jax.vmap(by_hand, (0, None))(stacked, X))


def test_custom_derivatives_hold_for_results_and_those_of_operations_for_captures():
    w, x = {"w": normal(0, 4, 4)}, normal(1, 3, 4)
    run = jc.capture(lambda p, x: halved(p["w"], x), at="w")
    wrapped = (run, jax.jit(run), jax.checkpoint(run))
    plain = jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p["w"])))(w)["w"]
    through = jax.grad(lambda p: jnp.sum(jnp.sin(x @ p["w"])))(w)["w"]
    for each in wrapped:
        result, found = each(w, x)
        same((result, found["w"]), (jnp.tanh(x @ w["w"]), [x @ w["w"]]))
        loss = lambda p, each=each: jnp.sum(each(p, x)[0]) + jnp.sum(jnp.sin(each(p, x)[1]["w"][0]))
        same(jax.grad(loss)(w)["w"], plain / 2 + through)


def test_custom_jvp_has_both_too():
    @jax.custom_jvp
    def double(w, x):
        return x @ w

    double.defjvp(lambda p, t: (double(*p), 2 * (t[1] @ p[0] + p[1] @ t[0])))
    w, x = {"w": normal(0, 4, 4)}, normal(1, 3, 4)
    run = jc.capture(lambda p, x: double(p["w"], x), at="w")
    _, (result, found) = jax.jvp(lambda x: run(w, x), (x,), (x,))
    same((result, found["w"][0]), (2 * x @ w["w"], x @ w["w"]))


def test_a_parameter_used_twice_has_two_in_program_order():
    table, ids = normal(0, 9, 4), jnp.array([1, 8, 1])
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T
    first, second = jc.capture(fn, at="table")({"table": table}, ids)[1]["table"]
    same((first, second), (table[ids], jnp.tanh(table[ids]) @ table.T))
    (only,) = jc.capture(fn, at="table", what="input")({"table": table}, ids)[1]["table"]
    same(only, jnp.tanh(table[ids]))


def test_a_call_shared_by_two_places_gives_two():
    w = {"w": normal(0, 4, 4)}
    layer = jax.jit(lambda w, x: x @ w)
    fn = lambda p, x: layer(p["w"], jnp.tanh(layer(p["w"], x)))
    first, second = jax.jit(jc.capture(fn, at="w"))(w, X)[1]["w"]
    same((first, second), (X @ w["w"], jnp.tanh(X @ w["w"]) @ w["w"]))


def test_joined_weights_have_their_part_of_the_output():
    params = {"q": normal(0, 4, 2), "k": normal(1, 4, 3)}
    joined = lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1)
    turned = lambda p, x: (jnp.concatenate([p["q"].T, p["k"].T]) @ x.T).T
    for fn, turn in ((joined, lambda y: y), (turned, jnp.transpose)):
        found = jc.capture(fn, at="*")(params, X)[1]
        same({k: turn(v[0]) for k, v in found.items()}, {k: X @ w for k, w in params.items()})


def test_convolutions_and_experts():
    params = {"conv": normal(0, 3, 4, 5), "experts": normal(1, 2, 5, 3)}

    def fn(params, x, sizes):
        numbers = ("NWC", "WIO", "NWC")
        y = lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=numbers)
        return lax.ragged_dot(y[0], params["experts"], sizes), y

    x, sizes = normal(2, 1, 6, 4), jnp.array([2, 4])
    (result, y), found = jc.capture(fn, at="*")(params, x, sizes)
    same((found["conv"][0], found["experts"][0]), (y, result))


def loop(params, x):
    body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"]))
    return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]


def branch(params, x):
    return lax.cond(x.sum() > 0, lambda x: x @ params["w"], lambda x: x, x)


def sharded(params, x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    block = lambda w, x: x @ w
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    return jax.shard_map(block, mesh=mesh, **specs)(params["w"], x)


@pytest.mark.parametrize(
    "fn, why",
    [(loop, "a while loop"), (branch, "a branch, which may not run"), (sharded, "a shard_map")],
)
def test_what_cannot_escape_is_named_with_its_line(fn, why):
    params, x = {"w": normal(0, 4, 4)}, normal(1, 8, 4)
    with pytest.raises(ValueError, match=rf"'w' of shape \(4, 4\).*{why}.*capture_test.py"):
        jc.capture(fn, at="w")(params, x)


def test_other_parameters_may_be_in_loops():
    params = {"w": normal(0, 4, 4), "out": normal(1, 4, 2)}
    fn = lambda p, x: loop(p, x) @ p["out"]
    (got,) = jc.capture(fn, at="out")(params, X)[1]["out"]
    same(got, fn(params, X))


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: jc.capture(alone, at="in/kernle")(PARAMS, X), ValueError, "paths are in/kernel"),
        (
            lambda: jc.capture(alone, at="in/bias")(PARAMS, X),
            ValueError,
            "'in/bias', which no product",
        ),
        (lambda: jc.capture(alone, at="layers", what="grad"), ValueError, "what='grad'"),
        (
            lambda: jc.capture(alone, at="layers")(jc.compress(PARAMS, jc.quantize("int8")), X),
            ValueError,
            r"'in/kernel' of shape \(4, 6\) is a QuantizedArray.*materialize",
        ),
    ],
)
def test_errors_name_what_would_work(make, error, match):
    with pytest.raises(error, match=match):
        make()
