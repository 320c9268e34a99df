"""Entries that data choose: each has scales and statistics of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from tests.models.case import normal

X = normal(0, 10, 8)
IDS = jnp.array([0, 1, 2, 3, 0, 1, 2, 2, 1, 3])
SIZES = 10.0 ** jnp.arange(4)
STACK = normal(1, 3, 4, 8, 6) * SIZES[:, None, None] * 7.0 ** jnp.arange(3)[:, None, None, None]
LAYERS = jnp.arange(3)


def rows(fn):
    return jax.vmap(fn, (None, 0, 0))


def in_a_loop(lookup):
    def fn(p, x, ids):
        step = lambda layer, y: y + rows(lambda p, x, i: x @ lookup(p["w"], layer, i))(p, x, ids)
        return lax.fori_loop(0, 3, step, jnp.zeros((10, 6)))

    return fn


TWICE = {
    "one after the other": rows(lambda p, x, i: x @ p["w"][i % 3][i]),
    "both at once": rows(lambda p, x, i: x @ p["w"][i % 3, i]),
    "of all rows": lambda p, x, ids: jnp.einsum("bk,bkn->bn", x, p["w"][ids % 3, ids]),
    "in a loop": in_a_loop(lambda w, layer, i: w[layer][i]),
    "the second one first": in_a_loop(lambda w, layer, i: w[:, i][layer]),
    "in nested loops": lambda p, x, ids: lax.fori_loop(
        0,
        3,
        lambda layer, y: lax.fori_loop(0, 4, lambda e, y: y + x @ p["w"][layer][e], y),
        jnp.zeros((10, 6)),
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_lookups_along_two_axes(name):
    fn, params = TWICE[name], {"w": STACK}
    uses = jc.uses(fn, params, X, IDS)
    small = jc.compress(params, jc.quantize("int8"), uses=uses)["w"]
    assert small.scale.shape == (3, 4, 1, 6)
    assert small.materialize().shape == STACK.shape
    (stats,) = jc.calibrate(fn, params, [(X, IDS)])["w"]
    want = np.zeros((3, 4, 8, 8))
    for layer in range(3):
        for e in range(4):
            if "loops" in name:
                met = X
            elif "loop" in name or "second" in name:
                met = X[IDS == e]
            else:
                met = X[(IDS % 3 == layer) & (IDS == e)]
            want[layer, e] = met.T @ met / max(len(met), 1)
            assert stats.rows[layer, e] == len(met)
    np.testing.assert_allclose(stats.second_moment, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, ids: jax.vmap(lambda table: table[ids])(p["w"]),
        lambda p, ids: p["w"][:, ids],
        lambda p, ids: jax.vmap(lambda table: jax.vmap(lambda i: table[i])(ids))(p["w"]),
    ],
)
def test_tables_of_an_ensemble_have_scales_of_their_own(fn):
    tables = normal(2, 4, 12, 8) * SIZES[:, None, None]
    uses = jc.uses(fn, {"w": tables}, IDS)
    small = jc.compress({"w": tables}, jc.quantize("int8"), uses=uses)["w"]
    assert small.scale.shape == (4, 12, 1)


@pytest.mark.parametrize(
    ("fn", "order"),
    [
        (lambda p, x: x @ p["w"][::-1], slice(None, None, -1)),
        (lambda p, x: x @ p["w"][::-1][::-1], slice(None)),
        (lambda p, x: x @ p["w"][:, ::-1], slice(None)),
    ],
)
def test_statistics_follow_entries_in_the_opposite_order(fn, order):
    x = X * jnp.arange(1.0, 9.0)
    (stats,) = jc.calibrate(fn, {"w": normal(3, 8, 6)}, [x])["w"]
    met = x[:, order]
    np.testing.assert_allclose(stats.second_moment, met.T @ met / 10, rtol=1e-5)


def test_what_cannot_be_measured_is_said():
    def top2(p, x):
        scores, ids = lax.top_k(x @ p["router"], 2)
        hidden = jnp.einsum("tk,tekn->ten", x, p["up"][ids])
        return jnp.einsum("ten,tenk,te->tk", hidden, p["down"][ids], jax.nn.softmax(scores))

    params = {"router": normal(4, 8, 4), "up": normal(5, 4, 8, 6), "down": normal(6, 4, 6, 8)}
    with pytest.warns(
        jc.UnmeasuredWarning, match="no statistics of down: the sums of their products"
    ):
        stats = jc.calibrate(top2, params, [X])
    assert sorted(stats) == ["router", "up"]
    small = jc.compress(params, jc.quantize("int8"), uses=jc.uses(top2, params, X))
    assert small["down"].scale.shape[0] == 4


def test_adapters_of_experts_in_order():
    fn = rows(lambda p, x, i: x @ (p["w"][i] + p["a"][i] @ p["b"][i]))
    params = {"w": normal(7, 4, 8, 6), "a": normal(8, 4, 8, 2), "b": normal(9, 4, 2, 6)}
    small = jc.compress_in_order(fn, params, jc.quantize("int8"), [(X, IDS)], progress=False)
    want = jc.compress(params, jc.quantize("int8"), uses=jc.uses(fn, params, X, IDS))
    jax.tree.map(np.testing.assert_array_equal, small, want)
