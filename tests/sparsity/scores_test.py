"""Scores against NumPy, and against the answers of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import Parameter
from jaxopt_compress.tree import Layout

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxopt_compress.AssumedLayout", "ignore::jaxopt_compress.LargerWarning"
)
HALF = jc.schedules.constant(0.5)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def masks(c, params, **found):
    state = jax.jit(functools.partial(c.init, **found))(params)
    return {path: np.asarray(leaf.mask) for path, leaf in state.leaves.items()}


def smallest_out(scores, pruned):
    """Of each row: true but for the ``pruned`` lowest scores."""
    order = np.argsort(np.argsort(scores, -1, kind="stable"), -1)
    return order >= pruned


def test_wanda_compares_within_outputs():
    """Against sorts of each column, with second moments of inputs that differ by far."""
    w, x = normal(0, 12, 5), normal(1, 40, 12) * 10.0 ** np.linspace(-2, 2, 12, dtype=np.float32)
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.asarray(w * [1, 100, 1, 0.01, 1])}
    stats = jc.calibrate(fn, params, [jnp.asarray(x)])
    got = masks(jc.prune(jc.scores.wanda(), jc.schedules.constant(0.75)), params, stats=stats)["w"]
    scores = np.abs(np.asarray(params["w"])) * np.linalg.norm(x, axis=0)[:, None]
    np.testing.assert_array_equal(got, smallest_out(scores.T, 9).T)
    two_four = jc.prune(jc.scores.wanda(), pattern="2:4")
    got = masks(two_four, params, stats=stats)["w"]
    grouped = scores.T.reshape(5, 3, 4)
    np.testing.assert_array_equal(got, smallest_out(grouped, 2).reshape(5, 12).T)
    with pytest.raises(ValueError, match=r"score of 'w' of shape \(12, 5\) reads its stats"):
        jc.prune(jc.scores.wanda(), HALF).init(params)


@pytest.mark.slow
def test_wanda_of_scanned_layers_takes_the_norms_of_each():
    layers = jnp.asarray(normal(0, 3, 6, 6))

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]

    x = jnp.asarray(normal(1, 8, 6) * np.array([1, 9, 1, 9, 1, 9], np.float32))
    params = {"layers": layers}
    found = {"uses": jc.uses(fn, params, x), "stats": jc.calibrate(fn, params, [x])}
    got = masks(jc.prune(jc.scores.wanda(), HALF), params, **found)["layers"]
    for i in range(3):
        scores = np.abs(np.asarray(layers[i])) * np.linalg.norm(x, axis=0)[:, None]
        np.testing.assert_array_equal(got[i], smallest_out(scores.T, 3).T)
        x = jnp.tanh(x @ layers[i])


def lamp_by_loop(w):
    flat = np.abs(w.ravel()).astype(np.float64)
    order = np.argsort(flat, kind="stable")
    scores = np.zeros(flat.size)
    for at, i in enumerate(order):
        scores[i] = flat[i] ** 2 / np.sum(flat[order[at:]] ** 2)
    return scores.reshape(w.shape)


@pytest.mark.parametrize("layout", [Layout((-2,), (-1,)), Layout((-1,), (-2,), (-3,))])
def test_lamp_is_the_loop(layout):
    """Of each entry of a stack by itself, ties and scales of their own included."""
    w = normal(0, 3, 4, 5) * np.array([1, 1000, 1e-3], np.float32)[:, None, None]
    w = w if layout.stack else w[0]
    if not layout.stack:
        w[:2] = 0.5  # Ties are in the order of matrices, here the array's own.
    score = jc.scores.lamp()
    got = score.score(Parameter("w", jnp.asarray(w), layout), None)
    want = np.stack([lamp_by_loop(x) for x in w]) if layout.stack else lamp_by_loop(w)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    assert score.scope == "global"


def test_lamp_prunes_layers_by_what_is_left_in_them():
    params = {"a": jnp.asarray(normal(0, 8, 8)), "b": 1e-3 * jnp.asarray(normal(1, 16, 4))}
    got = masks(jc.prune(jc.scores.lamp(), jc.schedules.constant(0.75)), params)
    scores = {k: lamp_by_loop(np.asarray(w)) for k, w in params.items()}
    limit = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[96]
    for k in params:
        np.testing.assert_array_equal(got[k], scores[k] >= limit)


def test_fpgm_is_the_sum_of_distances():
    """Of each entry of a stack by itself; the mean over a channel is what `prune` compares."""
    w = normal(0, 3, 4, 5) * np.array([1, 100, 0.01], np.float32)[:, None, None]
    got = jc.scores.fpgm().score(Parameter("w", jnp.asarray(w), Layout((-2,), (-1,), (-3,))), None)
    for own, found in zip(w.astype(np.float64), got, strict=True):
        want = [sum(np.linalg.norm(own[:, n] - own[:, m]) for m in range(5)) for n in range(5)]
        np.testing.assert_allclose(found, np.broadcast_to(want, (4, 5)), rtol=1e-5)


@pytest.mark.slow
def test_random_masks_are_nested_and_apart():
    key = jax.random.key(1)
    by = jc.scores.random(key)
    params = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}
    few, many = (masks(jc.prune(by, jc.schedules.constant(s)), params) for s in (0.9, 0.4))
    assert all((few[k] <= many[k]).all() for k in params)
    assert (few["a"] != few["b"]).any()
    same = masks(jc.prune(jc.scores.random(key), jc.schedules.constant(0.9)), params)
    np.testing.assert_array_equal(same["a"], few["a"])
    c = jc.prune(jc.scores.random(key, renew=True), jc.schedules.constant(0.9, every=1))
    state = c.init(params)
    moved = jax.jit(c.update)(state, params)
    assert bool(jnp.any(moved.leaves["a"].mask != state.leaves["a"].mask))


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def batch():
    params = {"a": jnp.asarray(normal(0, 4, 5)), "b": jnp.asarray(normal(1, 5, 2)), "n": 3}
    return params, jnp.asarray(normal(2, 7, 4)), jnp.asarray(normal(3, 7, 2))


@pytest.mark.slow
def test_snip_and_grasp_against_dense_derivatives():
    params, x, y = batch()
    floats = {k: params[k] for k in ("a", "b")}
    g = jax.grad(loss)(floats, x, y)
    got = jc.scores.snip(loss, params, x, y)
    for k, slope in g.items():
        np.testing.assert_allclose(got[k], np.abs(floats[k] * slope), rtol=1e-5, atol=1e-7)
    flat, build = jax.flatten_util.ravel_pytree(floats)  # pyright: ignore
    slope, hessian = (d(lambda v: loss(build(v), x, y))(flat) for d in (jax.grad, jax.hessian))
    want = build(flat * (hessian @ slope))
    got = jc.scores.grasp(loss, params, x, y)
    for k in floats:
        np.testing.assert_allclose(got[k], want[k], rtol=1e-4, atol=1e-5)
    by = jc.scores.given(got, signed=True)
    c = jc.prune(by, HALF, where=["a", "b"], scope="global")
    found = masks(c, params)
    limit = np.sort(np.concatenate([np.ravel(want[k]) for k in floats]))[15]
    assert limit != 0
    for k in floats:
        np.testing.assert_array_equal(found[k], np.asarray(got[k]) >= limit - 1e-6)
    with pytest.raises(ValueError, match=r"nothing for 'c' of shape \(2, 2\), but for a, b"):
        jc.prune(by, HALF).init({"c": jnp.ones((2, 2))})


@pytest.mark.slow
def test_synflow_conserves_flow():
    """The sum of scores is the same in each layer, and no layer vanishes over rounds."""
    params, x, _ = batch()
    params = {"a": params["a"], "b": 1e-3 * params["b"]}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    by = jc.scores.synflow(fn, params, x)
    np.testing.assert_allclose(jnp.sum(by["a"]), jnp.sum(by["b"]), rtol=1e-5)
    view = params
    for density in 0.2 ** (np.arange(1, 6) / 5):
        score = jc.scores.given(jc.scores.synflow(fn, view, x))
        c = jc.prune(score, jc.schedules.constant(1 - density), scope="global")
        view = c.apply(params, c.init(params))
    kept = {k: int(jnp.sum(w != 0)) for k, w in view.items()}
    assert sum(kept.values()) == 6 and min(kept.values()) >= 1
    assert bool(jnp.any(fn(jax.tree.map(jnp.abs, view), jnp.ones_like(x)) > 0))


@pytest.mark.slow
def test_fisher_from_statistics():
    params = {"w": jnp.asarray(normal(0, 6, 4))}
    fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    batches = [jnp.asarray(normal(i, 1, 6)) for i in range(3)]
    stats = jc.calibrate(fn, params, batches, measures=(jc.measures.fisher(),))
    got = masks(jc.prune(jc.scores.fisher(), HALF), params, stats=stats)["w"]
    squares = np.mean([np.square(jax.grad(fn)(params, x)["w"]) for x in batches], 0)
    want = np.asarray(params["w"]) ** 2 * squares
    np.testing.assert_array_equal(got, want >= np.sort(want.ravel())[12])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jc.scores.saliency(2.0), "decay=2.0"),
        (lambda: jc.scores.movement(-1), "decay=-1"),
        (lambda: jc.scores.fisher(1.0), "decay=1"),
        (lambda: jc.grow.by_gradient(30), "fraction=30"),
        (lambda: jc.grow.by_momentum(0.3, decay=1.0), "decay=1.0"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
