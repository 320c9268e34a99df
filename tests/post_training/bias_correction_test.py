"""Corrected biases against the means that they are to keep."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc


class Net(nn.Module):
    """A convolution and a dense layer, with functions between that are no rectifiers."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(6, (3, 3), padding="VALID")(x)).mean((1, 2))
        return nn.Dense(3)(x), x


@pytest.mark.ci
def test_means_of_a_net_are_kept():
    x = jax.random.uniform(jax.random.key(0), (64, 5, 5, 2))
    params = Net().init(jax.random.key(1), x)
    stats = jc.calibrate(Net().apply, params, [x])
    c = jc.quantize("int2", where="**/kernel")
    small = jc.compress(params, c, uses=jc.uses(Net().apply, params, x))
    rw = jc.correct_biases(Net().apply, params, small, x, stats=stats)
    assert sorted(rw.shifts) == ["params/Conv_0/bias", "params/Dense_0/bias"]
    conv = jc.materialize(small)["params"]["Conv_0"]
    mean = lambda p: np.asarray(nn.Conv(6, (3, 3), padding="VALID").apply({"params": p}, x)).mean(
        (0, 1, 2)
    )
    want = mean(params["params"]["Conv_0"])
    before, after = mean(conv), mean({**conv, "bias": rw.params["params"]["Conv_0"]["bias"]})
    assert np.abs(before - want).max() > 1e-2
    np.testing.assert_allclose(after, want, atol=1e-5)  # means of some thousand float32 sums
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jc.materialize(rw.undo(rw.params)),
        jc.materialize(small),
    )


def test_weights_without_a_bias_are_named():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] + p["b"]
    params = {"w": jnp.ones((4, 4)) / 3, "v": jnp.ones((4, 2)) / 3, "b": jnp.zeros(2)}
    x = jax.random.normal(jax.random.key(0), (16, 4))
    small = jc.compress(params, jc.quantize("int2", where=["w", "v"]), uses=jc.uses(fn, params, x))
    stats = jc.calibrate(fn, params, [x])
    rw = jc.correct_biases(fn, params, small, x, stats=stats)
    assert "one entry per channel" in rw.skipped["w"] and list(rw.shifts) == ["b"]
    with pytest.raises(ValueError, match="no bias to correct"):
        jc.correct_biases(lambda p, x: x @ p["w"], params, small, x, stats=stats)


class Layer(nn.Module):
    """Two dense layers with a residual connection."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(x))), None


class Stack(nn.Module):
    """Layers with parameters of their own, in a scan."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(nn.remat(Layer), **axes)()(x, None)[0]


@pytest.mark.slow
def test_each_layer_of_a_scanned_stack_has_a_correction_of_its_own():
    """By definition: what each layer's weights take from the means of what they met."""
    x = 1 + jax.random.normal(jax.random.key(0), (64, 4))
    params = Stack().init(jax.random.key(1), x)
    sizes = jnp.array([1.0, 10.0, 0.1])[:, None, None]
    name = "ScanCheckpointLayer_0"
    for dense in params["params"][name].values():
        dense["kernel"] = dense["kernel"] * sizes
    fn = Stack().apply
    c = jc.quantize("int2", where="**/kernel")
    small = jc.compress(params, c, uses=jc.uses(fn, params, x))
    stats = jc.calibrate(fn, params, [x])
    rw = jc.correct_biases(fn, params, small, x, stats=stats)
    assert not rw.skipped and len(rw.shifts) == 2
    for dense in ("Dense_0", "Dense_1"):
        path = f"params/{name}/{dense}"
        wrong = small["params"][name][dense]["kernel"].materialize()
        wrong = np.asarray(wrong - params["params"][name][dense]["kernel"])
        mean = np.asarray(stats[f"{path}/kernel"][0].mean)
        for layer in range(3):
            want = -mean[layer] @ wrong[layer]
            np.testing.assert_allclose(rw.shifts[f"{path}/bias"][layer], want, atol=1e-5)


INDIRECT = {
    "subtracted": lambda p, x: x @ p["w"] - p["b"],
    "negated": lambda p, x: p["b"] - x @ p["w"],
    "rectified": lambda p, x: jax.nn.relu(x @ p["w"]) + p["b"],
    "scaled": lambda p, x: 0.1 * (x @ p["w"]) + p["b"],
    "divided": lambda p, x: x @ p["w"] / 8 + p["b"],
    "pooled": lambda p, x: (x @ p["w"]).reshape(-1, 2, 4).sum(1) + p["b"],
    "doubled": lambda p, x: (lambda y: y + y)(x @ p["w"]) + p["b"],
    "negated twice": lambda p, x: (p["c"] - x @ p["w"]) + p["b"],
    "normalized": lambda p, x: (x @ p["w"] - p["b"]) * p["c"],
}


def measured(fn, *stack):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"w": draw(*stack, 4, 4), "b": draw(*stack, 4), "c": draw(*stack, 4)}
    x = 1 + draw(64, 4)
    small = jc.compress(params, jc.quantize("int2", where="w"), uses=jc.uses(fn, params, x))
    return params, small, x, jc.calibrate(fn, params, [x])


@pytest.mark.ci
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", INDIRECT)
def test_only_what_is_added_to_the_product_itself_is_corrected(name, scan):
    one = INDIRECT[name]
    fn = (lambda p, x: jax.lax.map(lambda own: one(own, x), p)) if scan else one
    params, small, x, stats = measured(fn, *([2] if scan else []))
    with pytest.raises(ValueError, match=r"'w': .*is not added to its result itself"):
        jc.correct_biases(fn, params, small, x, stats=stats)


@pytest.mark.ci
@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ p["w"] + p["b"],
        lambda p, x: p["b"] + (x @ p["w"])[:, None, :].reshape(-1, 4),
        lambda p, x: (x @ p["w"] + p["c"]) + p["b"],
    ],
)
def test_means_of_sums_are_kept(fn):
    params, small, x, stats = measured(fn)
    rw = jc.correct_biases(fn, params, small, x, stats=stats)
    error = lambda p: np.abs((fn(jc.materialize(p), x) - fn(params, x)).mean(0)).max()
    assert error(small) > 0.1 and error(rw.params) < 1e-5


class Normalized(nn.Module):
    """A convolution whose result a batch norm shifts and scales by what it has seen."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


@pytest.mark.ci
def test_statistics_of_batch_norms_are_no_biases():
    x = jax.random.uniform(jax.random.key(0), (32, 5, 5, 2))
    fn = Normalized().apply
    params = Normalized().init(jax.random.key(1), x)
    c = jc.quantize("int2", where="**/kernel")
    small = jc.compress(params, c, uses=jc.uses(fn, params, x))
    rw = jc.correct_biases(fn, params, small, x, stats=jc.calibrate(fn, params, [x]))
    assert list(rw.shifts) == ["params/Dense_0/bias"]
    assert "'batch_stats/BatchNorm_0/mean' is not" in rw.skipped["params/Conv_0/kernel"]
