import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.models import CASES

W = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32))


def magnitude(schedule, pattern=None, where=None):
    return jc.prune(jc.scores.magnitude(), schedule, pattern, where)


def largest_by_sort(w, keep):
    """The rule for ties: among equal magnitudes the lower row-major index is kept."""
    flat = np.abs(np.asarray(w, np.float64)).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    return mask.reshape(w.shape)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_counts_are_exact(sparsity):
    keep = W.size - int(np.floor(W.size * sparsity + 0.5))
    for w in (W, jnp.round(W)):
        mask = magnitude(jc.schedules.constant(sparsity)).init({"w": w}).leaves["w"].mask
        np.testing.assert_array_equal(mask, largest_by_sort(w, keep))


def test_known_answers():
    # Magnitude is Wanda's score for inputs of equal norms: its 2:4 answer on 1..8.
    w = jnp.arange(1.0, 9.0).reshape(8, 1)
    view = jc.materialize(jc.compress({"w": w}, magnitude(jc.schedules.constant(0.5), "2:4")))["w"]
    np.testing.assert_array_equal(view[:, 0], [0, 0, 3, 4, 0, 0, 7, 8])

    # Wanda's unstructured one, with norms of the inputs: 1..4 by 100, 10, 1, 0.1.
    def wanda(parameter):
        return jnp.abs(parameter.value) * jnp.array([100.0, 10.0, 1.0, 0.1])[:, None]

    c = jc.prune(wanda, jc.schedules.constant(0.5))
    view = jc.materialize(jc.compress({"w": jnp.arange(1.0, 5.0)[:, None]}, c))["w"]
    np.testing.assert_array_equal(view[:, 0], [1, 2, 0, 0])


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("3:5", 0.4)])
def test_patterns_hold_in_every_group_of_the_contraction(pattern, sparsity):
    n, m = map(int, pattern.split(":"))
    small = jc.compress({"w": W}, magnitude(jc.schedules.constant(sparsity), pattern))["w"]
    assert small.pattern == (n, m)
    dense = np.asarray(small.materialize())
    for start in range(0, 8, m):
        group = slice(start, start + m)
        want = [largest_by_sort(column, n) for column in np.asarray(W)[group].T]
        np.testing.assert_array_equal(dense[group] != 0, np.transpose(want))


def test_stacks_are_pruned_entry_by_entry():
    stack = jnp.stack([W, 100 * W, jnp.flip(W, 0)])
    with pytest.warns(jc.AssumedLayout, match="blocks"):
        state = magnitude(jc.schedules.constant(0.75)).init({"blocks": stack})
    counts = np.sum(np.asarray(state.leaves["blocks"].mask), (1, 2))
    np.testing.assert_array_equal(counts, [12, 12, 12])


def test_gradual_schedule():
    schedule = jc.schedules.polynomial(0.8, begin=2, end=8, initial=0.0, every=3)
    c = magnitude(schedule)
    update = jax.jit(c.update)
    state = c.init({"w": W})
    assert np.all(state.leaves["w"].mask)
    rng, changed = np.random.default_rng(1), []
    for step in range(1, 12):
        w = jnp.asarray(rng.standard_normal(W.shape).astype(np.float32))
        before = state.leaves["w"].mask
        state = update(state, {"w": w})
        mask = state.leaves["w"].mask
        assert int(state.count) == step
        if step in (2, 5, 8):
            p = (step - 2) / 6
            sparsity = np.float32(0.8 - 0.8 * (1 - p) ** 3)
            keep = W.size - int(np.floor(W.size * sparsity + 0.5))
            np.testing.assert_array_equal(mask, largest_by_sort(w, keep))
            changed.append(bool(np.any(mask & ~np.asarray(before))))
        else:
            np.testing.assert_array_equal(mask, before)
    assert changed == [False, False, True]  # Pruned at 5, some came back at 8.
    assert update._cache_size() == 1


def test_a_pattern_sets_in_with_the_schedule():
    c = magnitude(jc.schedules.polynomial(0.5, begin=1, end=3), "2:4")
    state = c.init({"w": W})
    kept = [int(np.sum(state.leaves["w"].mask))]
    for _ in range(3):
        state = c.update(state, {"w": W})
        kept.append(int(np.sum(state.leaves["w"].mask)))
    assert kept == [48, 48, 24, 24]
    assert c.compress({"w": W}, state)["w"].pattern == (2, 4)


def test_pruned_entries_get_no_gradient_and_can_come_back():
    c = magnitude(jc.schedules.polynomial(0.5, begin=0, end=1, initial=0.5))
    tx = jc.compressed_training(optax.sgd(1.0), c)
    params = {"w": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    opt_state = tx.init(params)
    np.testing.assert_array_equal(c.view(params, opt_state)["w"][:, 0], [4, 3, 0, 0])
    updates, opt_state = tx.update({"w": jnp.ones((4, 1))}, opt_state, params)
    np.testing.assert_array_equal(updates["w"][:, 0], [-1, -1, 0, 0])
    params = {"w": jnp.array([[0.5], [3.0], [2.0], [1.0]])}
    _, opt_state = tx.update({"w": jnp.ones((4, 1))}, opt_state, params)
    np.testing.assert_array_equal(c.view(params, opt_state)["w"][:, 0], [0.5, 3, 0, 0])


def test_patterns_follow_the_function():
    case = next(c for c in CASES if c.name == "linen_attention")
    fn, params, args = case.make()
    c = magnitude(jc.schedules.constant(0.5), "2:4", where="**/kernel")
    state = c.init(params, uses=jc.uses(fn, params, *args))
    axes = {path: leaf.axis for path, leaf in state.leaves.items()}
    want = {path: max(use[0].contracting) for path, use in case.uses.items() if use}
    assert axes == want


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: magnitude(jc.schedules.constant(0.5), "2-4"), ValueError, "'2-4'; it is .*'2:4'"),
        (lambda: magnitude(jc.schedules.constant(0.5), "4:4"), ValueError, "'4:4'; .*0 < n < m"),
        (
            lambda: magnitude(jc.schedules.constant(0.6), "2:4"),
            ValueError,
            r"'2:4' prunes 0.5 .* ends at 0.6; use schedules.constant\(0.5\)",
        ),
        (
            lambda: magnitude(jc.schedules.polynomial(0.75, 0, 9), "2:4"),
            ValueError,
            "'2:4' prunes 0.5 .* ends at 0.75",
        ),
        (
            lambda: magnitude(jc.schedules.constant(0.5), where="s").init({"s": jnp.float32(1)}),
            ValueError,
            r"'s' of shape \(\) is a scalar.*exclude it",
        ),
        (
            lambda: magnitude(jc.schedules.constant(0.5), "2:4", where="b").init(
                {"b": jnp.ones(8)}
            ),
            ValueError,
            r"'b' of shape \(8,\) has no contracted axis for the pattern '2:4'.*unstructured",
        ),
        (
            lambda: magnitude(jc.schedules.constant(0.5), where="i").init({"i": jnp.arange(3)}),
            TypeError,
            r"'i' of shape \(3,\) and dtype int32",
        ),
        (
            lambda: magnitude(jc.schedules.constant(0.5)).init(
                jc.compress({"w": W}, magnitude(jc.schedules.constant(0.5)))
            ),
            TypeError,
            r"'w' of shape \(8, 6\) is a SparseArray and cannot be pruned",
        ),
        (
            lambda: jc.prune(lambda parameter: parameter.value[0], jc.schedules.constant(0.5)).init(
                {"w": W}
            ),
            ValueError,
            r"score .*\(6,\) .*'w' of shape \(8, 6\)",
        ),
        (
            lambda: jc.prune(jc.scores.magnitude(), 0.5),  # pyright: ignore
            TypeError,
            r"schedule=0.5 is no schedule; .*schedules.constant\(0.5\)",
        ),
    ],
)
def test_errors_name_path_shape_and_what_works(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_statistics_outlive_a_donated_state():
    params, x = {"w": W}, jnp.ones((2, 8))
    stats = jc.calibrate(lambda p, x: x @ p["w"], params, [x])
    norms = lambda parameter: jnp.sqrt(jnp.diagonal(parameter.stats.second_moment))[:, None]
    wanda = jc.scores.Score(lambda parameter, norms: jnp.abs(parameter.value) * norms, norms)
    c = jc.prune(wanda, jc.schedules.constant(0.5))
    jax.jit(c.update, donate_argnums=0)(c.init(params, stats=stats), params)
    state = c.init(params, stats=stats)
    assert jax.tree.leaves(state.leaves["w"].kept)
    assert magnitude(jc.schedules.constant(0.5)).init(params, stats=stats).leaves["w"].kept is None


def test_a_score_without_its_statistics_says_what_to_pass():
    by_inputs = lambda p: p.stats.mean_magnitude[:, None] * jnp.abs(p.dense())
    c = jc.prune(by_inputs, jc.schedules.constant(0.5))
    params, x = {"w": jnp.ones((4, 3))}, jnp.array([[1.0, 5.0, 2.0, 3.0]])
    with pytest.raises(
        ValueError, match=r"score of 'w' of shape \(4, 3\) reads its stats.*calibrate"
    ):
        jc.compress(params, c, layout="in,out")
    fn = lambda p, x: x @ p["w"]
    small = jc.compress(params, c, uses=jc.uses(fn, params, x), stats=jc.calibrate(fn, params, [x]))
    np.testing.assert_array_equal(jc.materialize(small)["w"][:, 0] != 0, [False, True, False, True])


def test_counters_stay_at_their_end():
    """A wrapped one would start schedules anew."""
    c = jc.prune(jc.scores.magnitude(), jc.schedules.polynomial(0.5, begin=0, end=10))
    params = {"w": jnp.arange(8.0).reshape(4, 2)}
    state = c.init(params, uses=None)
    last = jnp.int32(2**31 - 1)
    state = c.update(state._replace(count=last), params)
    assert state.count == last
