"""Weight sharing: what shares a codebook, what gradients do, when it begins, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxopt_compress.AssumedLayout", "ignore::jaxopt_compress.LargerWarning"
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_gradients_of_centroids_are_sums_over_members():
    w, weights, c = normal(0, 8, 6), normal(1, 8, 6), jc.share(4)
    state = c.init({"w": w})
    loss = lambda learned: jnp.sum(
        c.apply({"w": w}, state._replace(learned=learned))["w"] * weights
    )
    got = jax.grad(loss)(state.learned)["w"]["centroids"].ravel()
    codes = np.asarray(state.leaves["w"].codes)
    want = [np.asarray(weights)[codes == k].sum() for k in range(4)]
    assert got[0] == 0  # The centroid that is 0 stays so.
    np.testing.assert_allclose(got[1:], want[1:], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "books"),
    [
        pytest.param({}, 1, marks=pytest.mark.ci),
        ({"per": "channel"}, 6),
        pytest.param({"group_size": 4}, 2, marks=pytest.mark.ci),
        pytest.param({"vector": 2}, 1, marks=pytest.mark.ci),
    ],
    ids=["tensor", "channel", "group", "vector"],
)
def test_scales_that_vary_along_every_axis(options, books):
    """Each entry of a stack, and each book, has at most so many values, and those of its scale."""
    scale = 10.0 ** jnp.arange(3)[:, None, None]
    w = normal(2, 3, 8, 6) * scale
    small = jc.compress({"w": w}, jc.share(4, **options))["w"]
    dense = np.asarray(small.materialize())
    # Two bits: four codes in a word.
    assert small.codes.shape == (3, 8 // options.get("vector", 1) // 4, 6)
    for layer in range(3):
        assert len(np.unique(dense[layer])) <= 4 * books * options.get("vector", 1)
        error = np.sqrt(np.mean((dense[layer] - w[layer]) ** 2)) / scale[layer, 0, 0]
        assert error < 0.8
    alone = jc.compress({"w": w[1]}, jc.share(4, **options))["w"]
    np.testing.assert_allclose(dense[1], alone.materialize(), rtol=1e-5)


def test_importance_moves_centroids():
    """Errors that meet larger inputs count more: the mean of a pair moves to the one that does."""
    w = jnp.array([[1.0], [2.0], [9.0]])
    x = jnp.array([[1.0, 3.0, 1.0]])
    model = lambda params, x: x @ params["w"]
    stats = jc.calibrate(model, {"w": w}, [x])
    uses = jc.uses(model, {"w": w}, x)
    small = jc.compress({"w": w}, jc.share(2, zero=False), uses=uses, stats=stats)["w"]
    np.testing.assert_allclose(small.materialize().ravel(), [1.9, 1.9, 9.0], rtol=1e-5)


@pytest.mark.ci
def test_training_from_pruning_to_sharing():
    """Sharing begins at its update; zeros stay, and what was trained is what is stored."""
    x = normal(3, 64, 8)
    y = jnp.tanh(x @ normal(4, 8, 4))
    c = jc.chain(jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.share(3, begin=5))
    tx = jc.compressed_training(optax.adam(3e-2), c)
    params = {"w": normal(5, 8, 4) / 3}
    loss = lambda view: jnp.mean((jnp.tanh(x @ view["w"]) - y) ** 2)

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    opt_state, losses = tx.init(params), []
    for _ in range(40):
        value, params, opt_state = step(params, opt_state)
        losses.append(float(value))
    view = c.view(params, opt_state)["w"]
    assert len(np.unique(view[view != 0])) == 3 and int(jnp.sum(view == 0)) == 16
    # Losses rise as values are shared, and fall as those are trained.
    assert losses[5] > losses[4] and losses[-1] < losses[5]
    small = jc.compress(params, c, state=opt_state)["w"]
    assert type(small.codes).__name__ == "SparseArray"
    np.testing.assert_array_equal(small.materialize(), view)


def test_codes_are_decided_again():
    """With every=: the parameter moves by the gradient at the view, and codes follow it."""
    c = jc.share(2, zero=False, every=2)
    params = {"w": jnp.array([[0.0], [0.1], [1.0]])}
    state = c.init(params)
    assert state.leaves["w"].codes.ravel().tolist() == [0, 0, 1]
    moved = {"w": jnp.array([[0.0], [0.9], [1.0]])}
    state = c.update(state, moved)
    assert state.leaves["w"].codes.ravel().tolist() == [0, 0, 1]
    state = c.update(state, moved)
    assert state.leaves["w"].codes.ravel().tolist() == [0, 1, 1]
    slope = jax.grad(lambda p: jnp.sum(c.apply(p, state)["w"]))(params)["w"]
    np.testing.assert_array_equal(slope, jnp.ones((3, 1)))


@pytest.mark.ci
@pytest.mark.parametrize("init", ["linear", "density"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_stays_visible_in_its_codebook(bad, init):
    """Where values are not known before: in programs, and when codes are decided again."""
    w = normal(7, 4, 2)
    c = jc.share(2, init, per="channel", every=1)
    seen = lambda w, state: np.isnan(c.apply({"w": w}, state)["w"]).any(0).tolist()
    worse = w.at[1, 0].set(bad)
    assert seen(worse, jax.jit(c.init)({"w": worse})) == [True, False]
    state = c.update(c.update(c.init({"w": w}), {"w": w}), {"w": worse})
    assert seen(worse, state) == [True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jc.share(1), "clusters=1; there are at least 2"),
        (lambda: jc.share(4, "kmeans++"), "init='kmeans\\+\\+' needs key="),
        (lambda: jc.share(4, "lloyd"), "init='lloyd'; there are 'linear'"),
        (lambda: jc.share(4, per="row"), "per='row'; there are"),
        (lambda: jc.share(4, codebooks=0), "codebooks=0; a vector has 1 to 16 codes"),
        (lambda: jc.share(4, codebooks=2, zero=True), "zero=True with codebooks=2"),
        (lambda: jc.share(4, vector=3), r"'w' of shape \(8, 6\): .*vector=3 do not divide the 8"),
        (
            lambda: jc.chain(
                jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.share(4, vector=2)
            ),
            "share with vector=2 cannot follow what prunes 'w'",
        ),
        (lambda: jc.chain(jc.quantize("int8"), jc.share(4)), "share cannot follow quantize at 'w'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make().init({"w": normal(6, 8, 6)})


@pytest.mark.ci
def test_sums_of_codebooks():
    """Each entry of a stack alike, by a product and as stored; better than one codebook alone."""
    scale = 10.0 ** jnp.arange(3)[:, None, None]
    w = normal(8, 3, 32, 16) * scale
    c = jc.share(8, "density", vector=2, codebooks=2, centroid_dtype="float16")
    small = jc.compress({"w": w}, c)["w"]
    assert [type(part).__name__ for part in small.parts] == ["CodebookArray"] * 2
    errors = jnp.linalg.norm(small.materialize() - w, axis=(1, 2)) / jnp.linalg.norm(w, axis=(1, 2))
    one = jc.compress({"w": w}, jc.share(8, "density", vector=2))["w"].materialize()
    alone = jnp.linalg.norm(one - w, axis=(1, 2)) / jnp.linalg.norm(w, axis=(1, 2))
    assert jnp.all(errors < 0.7 * alone), (errors, alone)
    x = normal(9, 3, 4, 32)
    lifted = jc.lift(lambda w, x: x @ w, on_fallback="error")(small, x)
    np.testing.assert_allclose(lifted, x @ small.materialize(), rtol=1e-4, atol=1e-2)


@pytest.mark.ci
def test_sums_begin_and_are_decided_again():
    c = jc.share(2, "density", vector=2, codebooks=2, begin=2, every=1)
    params = {"w": normal(10, 8, 4)}
    state = c.init(params)
    np.testing.assert_array_equal(c.apply(params, state)["w"], params["w"])
    for _ in range(2):
        state = c.update(state, params)
    first = c.apply(params, state)["w"]
    assert len(np.unique(np.asarray(first).reshape(4, 2, 4)[:, 0])) <= 4
    np.testing.assert_array_equal(jc.compress(params, c, state=state)["w"].materialize(), first)
    state = c.update(state, {"w": -params["w"]})
    codes = [part.codes.tolist() for part in state.leaves["w"].parts]
    want = nearest_sum(-params["w"], [state.learned["w"][f"centroids{i}"] for i in range(2)])
    assert codes == want


def nearest_sum(w, centroids):
    """Codes of all pairs of inputs, of every sum there is."""
    pairs = np.asarray(w).reshape(4, 2, 4)
    a, b = (np.asarray(c).reshape(2, 2) for c in centroids)
    sums = a[:, None] + b
    cost = ((pairs[:, None, None] - sums[None, :, :, :, None]) ** 2).sum(3)
    at = cost.reshape(4, 4, 4).argmin(1)
    return [(at // 2).tolist(), (at % 2).tolist()]


def test_other_names_are_answered():
    with pytest.raises(TypeError, match=r"write clusters="):
        jc.share(n_clusters=4)  # pyright: ignore


@pytest.mark.ci
def test_experts_that_met_nothing_keep_their_values():
    """Errors of all their entries count alike: no codebook is left without weights."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 16, 8)) * [[[1.0]], [[10.0]], [[100.0]]], jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 32, 16)), jnp.float32).at[1].set(0.0)
    model = lambda params, x: jnp.einsum("ebk,ekn->ebn", x, params["w"])
    uses, stats = jc.uses(model, {"w": w}, x), jc.calibrate(model, {"w": w}, [x])
    for init in ("linear", "density"):
        small = jc.compress({"w": w}, jc.share(8, init), uses=uses, stats=stats)["w"]
        errors = jnp.linalg.norm(small.materialize() - w, axis=(1, 2))
        relative = errors / jnp.linalg.norm(w, axis=(1, 2))
        assert jnp.all(relative < 0.35), relative


def test_groups_of_a_convolution_have_statistics_of_their_own():
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((3, 3, 2, 8), (2, 9, 9, 8)))
    how = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4}
    model = lambda params, x: jax.lax.conv_general_dilated(
        x, params["w"], **how, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    uses, stats = jc.uses(model, {"w": w}, x), jc.calibrate(model, {"w": w}, [x])
    small = jc.compress({"w": w}, jc.share(8), uses=uses, stats=stats)["w"]
    assert jnp.linalg.norm(small.materialize() - w) < 0.4 * jnp.linalg.norm(w)


@pytest.mark.ci
def test_most_of_the_codebook_of_vectors_is_used():
    """Centroids between the extremes lie along the diagonal, near which few vectors are."""
    w = {"w": normal(7, 128, 16)}
    codes = lambda **given: jc.compress(w, jc.share(32, vector=4, **given))["w"]
    used = len(np.unique(np.asarray(codes().unpacked())))
    assert used > 24
    np.testing.assert_array_equal(codes().materialize(), codes(init="density").materialize())
