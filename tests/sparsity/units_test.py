"""What is pruned together, and what is compared with what, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.sparsity.distributions import Size

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxopt_compress.AssumedLayout", "ignore::jaxopt_compress.LargerWarning"
)
HALF = jc.schedules.constant(0.5)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def prune(schedule=HALF, **kwargs):
    return jc.prune(jc.scores.magnitude(), schedule, **kwargs)


def convolved():
    """The uses of a kernel (3, 3, 6, 8)."""
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
    kernel = {"w": jnp.ones((3, 3, 6, 8))}
    return jc.uses(lambda p, x: conv(x, p["w"]), kernel, jnp.ones((1, 4, 4, 6)))


def masks(c, params):
    return {k: np.asarray(leaf.mask) for k, leaf in jax.jit(c.init)(params).leaves.items()}


def top(scores, keep):
    order = np.lexsort((np.arange(scores.size), -scores.ravel()))
    return np.isin(np.arange(scores.size), order[:keep]).reshape(scores.shape)


@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float32, jnp.bfloat16)])
def test_global_is_one_sort_of_everything(dtypes):
    params = {
        "a": jnp.asarray(normal(0, 8, 6), dtypes[0]),
        "b": jnp.asarray(np.round(100 * normal(1, 3, 5, 4)), dtypes[1]),
        "c": jnp.asarray(0.01 * normal(2, 4, 4)),
    }
    got = masks(prune(scope="global"), params)
    flat = np.concatenate([np.abs(np.asarray(w, np.float64)).ravel() for w in params.values()])
    want = top(flat, flat.size - flat.size // 2)
    np.testing.assert_array_equal(np.concatenate([got[k].ravel() for k in params]), want)
    assert not got["c"].any()


@pytest.mark.slow
def test_global_leaves_members_of_an_ensemble_apart():
    members = [{"a": normal(i, 4, 4) * 10.0**i, "b": normal(9 + i, 6, 2)} for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    got = masks(prune(scope="global", stack=1), stacked)
    for i, member in enumerate(members):
        alone = masks(prune(scope="global"), jax.tree.map(jnp.asarray, member))
        for k in member:
            np.testing.assert_array_equal(got[k][i], alone[k])


def test_outputs_are_compared_apart():
    w = normal(0, 3, 3, 6, 4) * np.array([1, 10, 100, 1000], np.float32)
    got = masks(prune(jc.schedules.constant(0.75), scope="output"), {"w": jnp.asarray(w)})["w"]
    for n in range(4):
        np.testing.assert_array_equal(got[..., n], top(np.abs(w[..., n]), 54 - 41))


@pytest.mark.fast("global")
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_channels_and_inputs(scope):
    """Of an HWIO kernel: whole outputs, and whole inputs with their windows."""
    w = normal(0, 3, 3, 6, 4)
    params = {"w": jnp.asarray(w)}
    got = masks(prune(pattern="channels", scope=scope), params)["w"]
    want = top(np.abs(w).mean((0, 1, 2)), 2)
    np.testing.assert_array_equal(got, np.broadcast_to(want, w.shape))
    got = masks(prune(pattern="inputs", scope=scope), params)["w"]
    want = top(np.abs(w).mean((0, 1, 3)), 3)
    np.testing.assert_array_equal(got, np.broadcast_to(want[:, None], w.shape))


def test_blocks_also_at_ragged_ends():
    """Entries of a stack apart; the mean over what there is of a block."""
    w = normal(0, 2, 5, 7) * np.array([1, 100], np.float32)[:, None, None]
    got = masks(prune(jc.schedules.constant(0.5), pattern="block:2x3"), {"w": jnp.asarray(w)})["w"]
    for i in range(2):
        rows, columns = np.arange(5) // 2, np.arange(7) // 3
        means = np.array(
            [[np.abs(w[i][rows == r][:, columns == c]).mean() for c in range(3)] for r in range(3)]
        )
        want = top(means, 9 - 5)  # 9 - round(4.5), halves up
        np.testing.assert_array_equal(got[i], want[rows][:, columns])


@pytest.mark.slow
def test_blocks_of_convolutions_are_of_their_matrices():
    w = normal(0, 3, 3, 2, 4)
    got = masks(prune(pattern="block:9x2"), {"w": jnp.asarray(w)})["w"]
    blocks = np.abs(w.reshape(2, 9, 2, 2)).mean((1, 3))
    want = np.repeat(np.repeat(top(blocks, 2), 9, 0), 2, 1).reshape(w.shape)
    np.testing.assert_array_equal(got, want)


def test_thresholds():
    params = {"w": jnp.array([[0.5, -2.0], [0.009, -0.01]])}
    c = jc.prune(jc.scores.magnitude(), threshold=0.01)
    np.testing.assert_array_equal(masks(c, params)["w"], [[1, 1], [0, 1]])
    falling = jc.prune(jc.scores.magnitude(), threshold=lambda step: 1.0 / (1 + step))
    state = falling.init(params)
    state = jax.jit(falling.update)(state, params)
    np.testing.assert_array_equal(state.leaves["w"].mask, [[1, 1], [0, 0]])
    by_deviation = jc.prune(lambda p: jnp.abs(p.value) / jnp.std(p.value), threshold=1.0)
    np.testing.assert_array_equal(masks(by_deviation, params)["w"], [[0, 1], [0, 0]])


def test_thresholds_of_signed_scores():
    """Nothing is pruned before there is a score; then what moves towards 0 is."""
    c = jc.prune(jc.scores.movement(), threshold=-0.5)
    params = {"w": jnp.array([[1.0, -1.0], [2.0, 3.0]])}
    state = c.init(params)
    assert bool(jnp.all(state.leaves["w"].mask))
    grads = {"w": jnp.array([[1.0, 1.0], [0.25, 0.1]])}  # -w g: -1, 1, -0.5, -0.3
    state = jax.jit(c.update)(state, params, grads=grads)
    np.testing.assert_array_equal(state.leaves["w"].mask, [[0, 1], [1, 1]])


def test_what_is_fixed_at_zero_takes_no_place():
    """Of entries that an earlier element keeps, as many as asked for stay, zeros included."""
    w = jnp.array([[0.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0]]).T
    first = jc.scores.given({"w": jnp.array([[9.0, 0, 0, 0, 0, 9, 9, 9]]).T})
    c = jc.chain(jc.prune(first, HALF), prune(schedule=jc.schedules.constant(0.75)))
    state = jax.jit(c.init)({"w": w}).states[1].leaves["w"]
    np.testing.assert_array_equal(state.mask[:, 0], [1, 0, 0, 0, 0, 1, 0, 0])
    c = jc.chain(jc.prune(first, HALF), jc.prune(jc.scores.movement(), pattern="1:2"))
    with pytest.raises(ValueError, match="at step 0, and the score accumulates"):
        c.init({"w": w})


def test_ragged_groups_keep_what_they_have():
    w = jnp.asarray(normal(0, 6, 3))
    got = masks(jc.prune(jc.scores.magnitude(), pattern="2:4"), {"w": w})["w"]
    np.testing.assert_array_equal(got[4:], True)
    np.testing.assert_array_equal(got[:4].sum(0), 2)


@pytest.mark.parametrize(
    ("sparsity", "want"),
    # 58 of 74 is what 80% of each parameter make, rounded down to entries.
    [(0.5, [0, 0.31, 0.655]), (58 / 74, [0.556, 0.7, 0.85]), (0.0, [0, 0, 0])],
)
def test_erk_known_answers(sparsity, want):
    shapes = {"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}
    sizes = {k: Size(shape) for k, shape in shapes.items()}
    got = jax.jit(lambda s: jc.distributions.erk()(sizes, s))(sparsity)
    np.testing.assert_allclose([got[k] for k in shapes], want, atol=6e-3)
    total = sum(sizes[k].size * got[k] for k in shapes)
    np.testing.assert_allclose(total, sparsity * 74, atol=1e-4)


def _convolved(params, x):
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=dims)
    return jax.nn.relu(x).mean((1, 2)) @ params["head"]


@pytest.mark.ci
def test_a_schedule_may_count_the_operations_of_products():
    """Those of the kept entries are the share that stays, at the first step and at later ones."""
    params = {"conv": jnp.asarray(normal(0, 3, 3, 8, 16)), "head": jnp.asarray(normal(1, 16, 40))}
    uses = jc.uses(_convolved, params, jnp.zeros((2, 8, 8, 8)))
    each = {k: sum(use.flops for use in uses[k]) / params[k].size for k in params}
    assert each["conv"] == 64 * each["head"]
    schedule = jc.schedules.polynomial(0.9, begin=0, end=2)
    c = prune(schedule, distribution=jc.distributions.erk(of="flops"))
    state = c.init(params, uses=uses)
    for step in (0, 1, 2):
        kept = sum(each[k] * int(jnp.sum(state.leaves[k].mask)) for k in params)
        share = kept / sum(each[k] * params[k].size for k in params)
        # One entry of the convolution is the least that can go.
        np.testing.assert_allclose(share, 1 - schedule.sparsity(step), atol=1e-3)
        state = jax.jit(c.update)(state, params)
    with pytest.raises(ValueError, match=r"no operations are known of 'conv', 'head': pass uses="):
        c.init(params)
    with pytest.raises(ValueError, match="'entries' and 'flops'"):
        jc.distributions.erk(of="bytes")


@pytest.mark.slow
def test_erk_over_a_gradual_schedule():
    """Each parameter by its own share, as a schedule asks for more."""
    params = {"small": jnp.asarray(normal(0, 8, 4)), "large": jnp.asarray(normal(1, 64, 32))}
    schedule = jc.schedules.polynomial(0.9, begin=0, end=2)
    c = prune(schedule, distribution=jc.distributions.erk())
    state, update = jax.jit(c.init)(params), jax.jit(c.update)
    for step in (1, 2):
        state = update(state, params)
        s = float(schedule.sparsity(step))
        sizes = {k: Size(w.shape) for k, w in params.items()}
        shares = jc.distributions.erk()(sizes, s)
        for k, w in params.items():
            want = w.size - int(np.floor(w.size * np.float32(shares[k]) + 0.5))
            assert int(jnp.sum(state.leaves[k].mask)) == want
    # The densities are as (8 + 4) / (8 * 4) to (64 + 32) / (64 * 32).
    assert np.mean(state.leaves["small"].mask) > 7 * np.mean(state.leaves["large"].mask)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prune(None), ValueError, "needs a schedule.*or threshold="),
        (lambda: prune(threshold=0.1), ValueError, "schedule= says how many.*give one"),
        (lambda: prune(None, threshold=-1.0), ValueError, "threshold=-1.0"),
        (lambda: prune(pattern="block:16"), ValueError, "'block:16'; it is.*'block:16x16'"),
        (lambda: prune(pattern="2:4", scope="leaf"), ValueError, "scope= with an n:m pattern"),
        (lambda: prune(scope="layer"), ValueError, "scope='layer'; there are 'leaf', 'output'"),
        (lambda: prune(pattern="channels", scope="output"), ValueError, "no part of one output"),
        (
            lambda: prune(scope="global", distribution=jc.distributions.erk()),
            ValueError,
            "distribution= with scope='global'",
        ),
        (
            lambda: prune(pattern="2:4t", grow=jc.grow.by_gradient(0.3)),
            ValueError,
            "grow= with a transposable.*pattern='2:4'",
        ),
        (
            lambda: prune(pattern="2:4t").init({"w": jnp.ones((3, 3, 6, 8))}, uses=convolved()),
            ValueError,
            "pattern='2:4t' does not divide axis -2 of .*take '2:4'",
        ),
        (lambda: prune(grow=0.3), TypeError, r"grow=0.3; jaxopt_compress.grow.by_gradient\(0.3\)"),
        (lambda: prune(backward="ste"), ValueError, "backward='ste'; there are 'masked'"),
        (lambda: prune(pruned="zero", backward="straight_through"), ValueError, "so they stay"),
        (
            lambda: prune(scope="output", where="b").init({"b": jnp.ones(8)}),
            ValueError,
            r"'b' of shape \(8,\) has no contracted axis.*scope='leaf'",
        ),
    ],
)
def test_errors_say_what_works(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.ci
def test_transposable_patterns_hold_for_the_transpose():
    w = jnp.asarray(normal(0, 2, 12, 8))
    c = jc.prune(jc.scores.magnitude(), pattern="2:4t", stack=1)
    for turned in (False, True):
        layout = "out,in" if turned else "in,out"
        small = jc.compress({"w": w.mT if turned else w}, c, layout=layout)["w"]
        kept = np.asarray(small.materialize() != 0).reshape(
            2, *((2, 4, 3, 4) if turned else (3, 4, 2, 4))
        )
        assert kept.sum(2).max() == 2 and kept.sum(4).max() == 2
        assert small.pattern == (2, 4) and kept.mean() > 0.45
