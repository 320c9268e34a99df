"""Folded batch norms against the function itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc


def spread(tree, seed=0):
    """Random values, different in each channel; variances are positive."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten(
        [jnp.asarray(np.exp(rng.normal(size=x.shape)) * 0.5, x.dtype) for x in leaves]
    )


class Net(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(x):
            return nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))

        x = norm(nn.Conv(4, (3, 3))(x))
        x = norm(nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False)(x))
        return norm(nn.Dense(3)(x.mean((1, 2))))


@pytest.fixture(scope="module")
def net():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    params = spread(Net().init(jax.random.key(1), x))
    return params, x, jc.fold_norms(Net().apply, params, x)


def test_linen_is_equal_and_smaller(net):
    params, x, rw = net
    assert rw.check(Net().apply, x, tolerance=1e-5).absolute > 0
    assert rw.skipped == {}
    assert len(jax.tree.leaves(rw.params)) == 6  # three weights and three biases
    assert len(jax.tree.leaves(params)) == 17
    kernel, norm = params["params"]["Conv_1"]["kernel"], params["params"]["BatchNorm_1"]
    var = params["batch_stats"]["BatchNorm_1"]["var"]
    expected = np.asarray(kernel) * np.asarray(norm["scale"]) / np.sqrt(np.asarray(var) + 1e-5)
    np.testing.assert_allclose(rw.params["params"]["Conv_1"]["kernel"], expected, rtol=1e-5)


@pytest.mark.slow
def test_transformations_of_the_rewritten_function(net):
    params, x, rw = net
    g = rw.function(Net().apply)
    expected = Net().apply(params, x)
    np.testing.assert_allclose(jax.jit(g)(rw.params, x), expected, rtol=1e-4)
    mapped = jax.vmap(g, (None, 0))(rw.params, x[:, None])
    np.testing.assert_allclose(mapped[:, 0], expected, rtol=1e-4)
    wanted = jax.grad(lambda x: Net().apply(params, x).sum())(x)
    got = jax.grad(lambda x: g(rw.params, x).sum())(x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(abs(wanted).max()))


@pytest.mark.ci
def test_undo_gives_the_parameters_back(net):
    params, _, rw = net
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        rw.undo(rw.params),
        params,
    )


def test_undo_after_a_change_computes_the_same(net):
    _, x, rw = net
    changed = jax.tree.map(lambda w: w * 1.25 + 0.1, rw.params)
    got = Net().apply(rw.undo(changed), x)
    np.testing.assert_allclose(got, rw.function(Net().apply)(changed, x), rtol=1e-4)


def test_masks_move_and_moments_raise(net):
    params, _, rw = net
    masks = rw.tree(jax.tree.map(lambda w: w > 1, params))
    assert jax.tree.structure(masks) == jax.tree.structure(rw.params)
    with pytest.raises(ValueError, match="changed by folding"):
        rw.tree(params)


def test_the_training_form_is_refused(net):
    _, x, rw = net
    train = Net(train=True)
    with pytest.raises(ValueError, match="inference form"):
        rw.function(lambda p, x: train.apply(p, x, mutable=["batch_stats"]))(rw.params, x)


def test_compressed_after_folding(net):
    _, x, rw = net
    g = rw.function(Net().apply)
    small = jc.compress(rw.params, jc.quantize("int8"), uses=jc.uses(g, rw.params, x))
    np.testing.assert_allclose(jc.lift(g)(small, x), g(jc.materialize(small), x), rtol=1e-3)


def plain(p, x):
    y = x @ p["w"]
    return y, (y - p["mean"]) * p["scale"] + p["bias"]


def test_a_product_that_is_read_elsewhere_is_not_folded():
    p = spread(
        {"w": jnp.ones((3, 4)), "mean": jnp.ones(4), "scale": jnp.ones(4), "bias": jnp.ones(4)}
    )
    with pytest.raises(ValueError, match="no batch norm"):
        jc.fold_norms(plain, p, jnp.ones((2, 3)))
    rw = jc.fold_norms(lambda p, x: plain(p, x)[1], p, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="'w'"):
        rw.function(plain)(rw.params, jnp.ones((2, 3)))


def test_tied_weights_are_skipped_with_the_reason():
    def fn(p, x):
        y = (x @ p["w"]) * p["scale"] + p["bias"]
        return ((y @ p["w"]) - p["mean"]) @ p["v"] * p["scale2"] + p["bias2"]

    one = jnp.ones(4)
    p = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "scale": one, "bias": one}
    p = spread({**p, "mean": one, "scale2": one, "bias2": one})
    x = jnp.ones((2, 4))
    rw = jc.fold_norms(fn, p, x)
    assert "used elsewhere" in rw.skipped["w"] and list(rw.folds) == ["v"]
    rw.check(fn, x, tolerance=1e-5)


def test_nnx_state_keeps_its_structure():
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    layers = (
        nnx.Conv(3, 4, (3, 3), rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs, use_running_average=True),
    )
    graph, state = nnx.split(nnx.Sequential(*layers))
    params, x = spread(state), jnp.ones((1, 4, 4, 3))

    def fn(params, x):
        return nnx.merge(graph, params)(x)

    rw = jc.fold_norms(fn, params, x)
    rw.check(fn, x, tolerance=1e-5)
    assert len(jax.tree.leaves(rw.params)) == 2


def vector_norm(p, y):
    return (y - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


@pytest.fixture(scope="module")
def four():
    one = jnp.ones(4)
    return spread({"w": jnp.ones((3, 4)), "mean": one, "var": one, "scale": one, "bias": one})


def halved(p, x):
    y = x.astype("bfloat16") @ p["w"].astype("bfloat16")
    return vector_norm(p, y.astype("float32"))


@pytest.mark.parametrize(
    ("fn", "tolerance"),
    [
        (halved, 2e-2),
        (lambda p, x: vector_norm(p, (p["w"].T @ x.T).T.reshape(2, 1, 4)), 1e-5),
        (lambda p, x: jax.vmap(lambda row: vector_norm(p, row @ p["w"]))(x), 1e-5),
    ],
    ids=["casts", "moved axes", "vmap"],
)
def test_casts_and_moves_are_followed(four, fn, tolerance):
    x = jax.random.normal(jax.random.key(0), (2, 3))
    rw = jc.fold_norms(fn, four, x)
    assert len(jax.tree.leaves(rw.params)) == 2 and rw.skipped == {}
    rw.check(fn, x, tolerance=tolerance)


@pytest.mark.ci
def test_a_norm_after_a_vmapped_module():
    eqx = pytest.importorskip("equinox")
    conv = eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0))
    arrays, static = eqx.partition(conv, eqx.is_array)
    one = jnp.ones(4)
    p = spread({"conv": arrays, "mean": one, "var": one, "scale": one, "bias": one})

    def fn(p, x):
        wide = {k: v if k == "conv" else v[:, None, None] for k, v in p.items()}
        return vector_norm(wide, jax.vmap(eqx.combine(p["conv"], static))(x))

    x = jax.random.normal(jax.random.key(1), (2, 3, 6, 6))
    rw = jc.fold_norms(fn, p, x)
    rw.check(fn, x, tolerance=1e-5)
    assert len(jax.tree.leaves(rw.params)) == 2 and rw.skipped == {}


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y[:, ::2].repeat(2, 1),
        lambda y: y[:, :, None].sum(-1).reshape(1, 8),
        lambda y: jnp.pad(y, ((0, 0), (1, 0)))[:, :4],
    ],
)
def test_a_norm_that_is_not_reached_is_listed(four, between):
    def fn(p, x):
        y = between(x @ p["v"])
        return vector_norm(p, x @ p["w"]), y * p["other"].reshape(y.shape[-1:])

    p = {**four, "v": jnp.ones((3, 4)), "other": jnp.arange(1.0, 5)}
    if between(jnp.ones((2, 4))).shape[1] == 8:
        p["other"] = jnp.arange(1.0, 9)
    rw = jc.fold_norms(fn, p, jnp.ones((2, 3)))
    assert "multiplied by parameters" in rw.skipped["v"] and list(rw.folds) == ["w"]
