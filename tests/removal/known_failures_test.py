"""What other tools for structural pruning are known to get wrong, or refuse.

Reshapes of vision transformers, squeeze and excite, depthwise convolutions with a multiplier and
fused projections are among the models of `models_test`; caches that follow are in `training_test`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.removal import law
from tests.removal.networks import linen

pytestmark = pytest.mark.ci

X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)


class Shuffled(nn.Module):
    """Group norms of two branches, which are concatenated, and shuffled (Zhang et al., 2018)."""

    groups: int

    @nn.compact
    def __call__(self, x):
        branch = lambda: nn.relu(nn.GroupNorm(3)(nn.Conv(6, (1, 1), use_bias=False)(x)))
        h = jnp.concatenate([branch(), branch()], -1)
        n, height, width, c = h.shape
        h = h.reshape(n, height, width, self.groups, c // self.groups)
        h = h.swapaxes(-1, -2).reshape(n, height, width, c)
        return nn.Dense(3)(nn.Conv(8, (1, 1), feature_group_count=2)(h).mean((1, 2)))


@pytest.mark.parametrize("groups, units", [(2, {2, 3}), (3, {2}), (4, {2, 4})])
def test_group_norm_concatenation_and_shuffle(groups, units):
    """Units are wider than channels, for norms and shuffles divide them in other ways."""
    fn, params, x = linen(Shuffled(groups), (2, 4, 4, 3))
    found = jc.find_groups(fn, params, x)
    inner = [g for g in found.values() if any("Conv_0" in m.path for m in g.members)]
    assert inner and not any(g.inexact for g in inner)
    params = law.values(params)
    for group in inner:
        law.check(fn, params, (x,), found.plan({group.name: [0]}), rtol=2e-4)


def test_weight_norm_divides_nothing_by_nothing():
    """A masked column has norm 0: exact with an epsilon, and refused without one."""

    def net(epsilon):
        unit = lambda w: w / jnp.sqrt(jnp.sum(jnp.square(w), 0, keepdims=True) + epsilon)
        return lambda p, x: jax.nn.relu(x @ (unit(p["w"]) * p["g"])) @ p["v"]

    params = law.values({"g": jnp.ones(6), "v": jnp.ones((6, 2)), "w": jnp.ones((3, 6))})
    groups = jc.find_groups(net(1e-6), params, X)
    law.check(net(1e-6), params, (X,), groups.plan({"w:1": [0, 3]}))
    groups = jc.find_groups(net(0.0), params, X)
    with pytest.raises(jc.NotRemovable, match="differs from the masked one"):
        groups.plan({"w:1": [0, 3]})
    # The smaller function has no such column, and is that of the others.
    rewrite = groups.plan({"w:1": [0, 3]}, allow_inexact=True).rewrite()
    stay = jax.tree.map(lambda x: x[..., [1, 2, 4, 5]], {"g": params["g"], "w": params["w"]})
    wanted = net(0.0)(stay | {"v": params["v"][jnp.array([1, 2, 4, 5])]}, X)
    law.close(rewrite.function(net(0.0))(rewrite.params, X), wanted, 1e-6)


def test_heads_of_a_fused_projection_that_are_written_out():
    """Each head takes its own columns: units of one head do not drag those of others along."""
    heads, size = 3, 4

    def fn(p, x):
        fused, out = x @ p["qkv"], []
        for i in range(heads):
            at = lambda part, i=i: slice((part * heads + i) * size, (part * heads + i + 1) * size)
            q, k, v = (fused[:, at(part)] for part in range(3))
            out.append(jax.nn.softmax(q @ k.T / size**0.5) @ v)
        return jnp.concatenate(out, -1) @ p["out"]

    params = law.values({"out": jnp.ones((12, 2)), "qkv": jnp.ones((3, 36))})
    groups = jc.find_groups(fn, params, X)
    by_count = {tuple(m.indices.shape[1] for m in g.members): len(g) for g in groups.values()}
    # Per unit: one query and its key; or one value and its row of the output.
    assert by_count == {(2,): 12, (1, 1): 12}
    units = {name: [0, 5, 6] for name in groups}
    law.check(fn, params, (X,), groups.plan(units))
