"""Folded factors against the function whose factors stand beside the weights."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.ci

D = 16
ROUNDING = 2e-5  # of some hundred float32 sums in another order


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def compressed(fn, params, c, *args):
    uses, stats = jc.uses(fn, params, *args), jc.calibrate(fn, params, [args])
    return jc.compress(params, c, uses=uses, stats=stats)


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * (jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale) + bias


def mlp(p, x):
    """A norm that two weights read, and a gate."""
    h = norm(x, p["scale"], p["bias"])
    return (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


MLP = {
    "scale": 1 + normal(0, D) / 8,
    "bias": normal(1, D),
    "gate": normal(2, D, 24),
    "up": normal(3, D, 24),
    "down": normal(4, 24, D),
}
# Channels of sizes of their own.
X = normal(5, 64, D) * jnp.asarray(np.geomspace(0.1, 30, D), jnp.float32)


def kinds(tree):
    flat = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jc.ScaledArray))
    return sum(isinstance(x, jc.ScaledArray) for x in flat)


def test_weights_that_share_a_norm_fold_where_they_agree():
    c = jc.awq("int4", where=["gate", "up", "down"], alpha=0.5)
    small = compressed(mlp, MLP, c, X)
    rw = jc.fold_scales(mlp, small, X)
    assert rw.folded == {"gate": "scale", "up": "scale", "down": "up"} and not rw.skipped
    assert kinds(small) == 3 and kinds(rw.params) == 0
    assert rw.check(mlp, X).relative < ROUNDING
    np.testing.assert_allclose(
        rw.params["scale"], MLP["scale"] * small["up"].factors[:, 0], rtol=1e-6
    )
    back = jc.materialize(rw.undo(rw.params))
    want = jc.materialize(small)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, want)


def test_weights_that_disagree_keep_their_factors():
    small = compressed(mlp, MLP, jc.smooth_quant(where=["gate", "up", "down"]), X)
    rw = jc.fold_scales(mlp, small, X)
    assert rw.folded == {"down": "up"} and sorted(rw.skipped) == ["gate", "up"]
    assert "'gate' and 'up' read the same activation and have diff" in rw.skipped["up"]
    # Rounding of floats brings single activations to the next code of int8.
    assert rw.check(mlp, X).relative < 1 / 127
    some = compressed(mlp, MLP, {"up": jc.awq("int4"), "gate": jc.quantize("int8")}, X)
    assert "'gate' reads the same" in jc.fold_scales(mlp, some, X).skipped["up"]


def test_dense_weights_that_read_the_same_are_divided():
    small = compressed(mlp, MLP, jc.awq("int4", where="up"), X)
    rw = jc.fold_scales(mlp, small, X)
    assert rw.folded == {"up": "scale"} and sorted(rw.factors) == ["bias", "gate", "scale"]
    np.testing.assert_allclose(rw.params["gate"] * small["up"].factors, MLP["gate"], rtol=1e-5)
    assert rw.check(mlp, X).relative < ROUNDING


def stacked(p, x):
    def body(x, w):
        return x + mlp(w, x), None

    return jax.lax.scan(jax.checkpoint(body), x, p)[0]


def test_each_layer_of_a_scanned_stack_has_scales_of_its_own():
    sizes = jnp.array([1.0, 8.0, 0.25])
    params = {k: jnp.stack([v * s for s in sizes]) for k, v in MLP.items()}
    params["scale"] = params["scale"] * jnp.exp(normal(7, 3, D))
    c = jc.awq("int4", where=["gate", "up", "down"], alpha=0.5)
    small = compressed(stacked, params, c, X)
    rw = jc.fold_scales(stacked, small, X)
    assert rw.folded == {"gate": "scale", "up": "scale", "down": "up"}
    factors = np.asarray(rw.factors["scale"])
    assert factors.shape == (3, D) and np.abs(factors[0] / factors[1] - 1).max() > 0.1
    assert rw.check(stacked, X).relative < ROUNDING


class Block(nn.Module):
    """Attention and an MLP behind norms."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        h = nn.relu(nn.Dense(24)(nn.RMSNorm()(x)))
        return x + nn.Dense(D)(h), None


class Net(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if not self.scan:
            return Block()(Block()(x, None)[0], None)[0]
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        return nn.scan(nn.remat(Block), **axes)()(x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_transformer_of_linen(scan):
    net, x = Net(scan), X[:32].reshape(2, 16, D)
    params = net.init(jax.random.key(0), x)
    c = jc.awq("int4", where="**/kernel", alpha=0.5)
    small = compressed(net.apply, params, c, x)
    rw = jc.fold_scales(net.apply, small, x)
    blocks = 1 if scan else 2
    # All but the output of attention, which a product without weights is in front of.
    assert len(rw.folded) == 5 * blocks and len(rw.skipped) == blocks
    assert {path.split("/")[-2] for path in rw.skipped} == {"out"}
    assert rw.check(net.apply, x).relative < ROUNDING


class Convs(nn.Module):
    """Convolutions, one with groups, and a dense layer that reads a flat image."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        x = nn.max_pool(nn.relu(nn.Conv(4, (1, 1))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.slow
def test_convolutions():
    net, x = Convs(), normal(8, 2, 8, 8, 3)
    params = net.init(jax.random.key(0), x)
    where = ["params/Conv_2/kernel", "params/Dense_0/kernel"]
    small = compressed(net.apply, params, jc.awq("int4", where=where), x)
    rw = jc.fold_scales(net.apply, small, x)
    assert rw.folded == {
        "params/Conv_2/kernel": "params/Conv_1/kernel",
        "params/Dense_0/kernel": "params/Conv_2/kernel",
    }
    assert rw.check(net.apply, x).relative < ROUNDING


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], "tanh is not positively homogeneous"),
        (lambda p, x: x[:, :1] * p["up"][0] @ p["down"], "is not the plain|scaled by no parameter"),
        (lambda p, x: (h := x @ p["up"]) @ p["down"] + h.sum(), "reduce_sum"),
    ],
)
def test_what_cannot_be_folded_says_why(fn, why):
    small = compressed(fn, MLP, jc.awq("int4", where="down"), X)
    rw = jc.fold_scales(fn, small, X)
    assert not rw.folded and not rw.factors
    assert re.search(why, rw.skipped["down"])


def test_masks_stay_and_numbers_are_refused():
    small = compressed(mlp, MLP, jc.awq("int4", where="down"), X)
    rw = jc.fold_scales(mlp, small, X)
    masks = {k: jnp.ones(v.shape, bool) for k, v in MLP.items()}
    assert rw.tree(masks)["up"] is masks["up"]
    with pytest.raises(ValueError, match=r"'up' of shape \(16, 24\) was changed"):
        rw.tree(MLP)
    with pytest.raises(ValueError, match="found no ScaledArray"):
        jc.fold_scales(mlp, MLP, X)
