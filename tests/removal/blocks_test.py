"""Residual blocks that are written out: found, and gone from parameters and function."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.removal import law
from tests.removal.networks import IMAGE, LM, ResNet, linen

pytestmark = pytest.mark.ci

X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)


def layer(p, x):
    return jax.nn.relu(x @ p["in"] + p["b"]) @ p["out"]


def net(p, x):
    """Two blocks, of which the second is rematerialized, and a sum that is no block."""
    x = x @ p["stem"] + p["bias"]
    x = x + layer(p["layers"][0], x)
    x = jax.checkpoint(lambda p, x: layer(p, x / (1 + jnp.abs(x))) + x)(p["layers"][1], x)
    return jnp.sum(x @ p["head"] + x @ p["other"], -1)


SHAPES = {
    "bias": (5,), "head": (5, 2), "other": (5, 2), "stem": (3, 5),
    "layers": [{"b": (6,), "in": (5, 6), "out": (6, 5)} for _ in range(2)],
}  # fmt: skip
PARAMS = law.values(
    jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda s: type(s) is tuple
    )
)


@pytest.fixture(scope="module")
def groups():
    return jc.find_groups(net, PARAMS, X)


def test_blocks_are_units(groups):
    own = ("b", "in", "out")
    assert groups["blocks"].paths == tuple(tuple(f"layers/{i}/{k}" for k in own) for i in (0, 1))
    assert "0: layers/0/** (3 parameters)" in groups.table()
    assert "it goes as a whole with unit 1 of 'blocks'" in groups.why("layers/1/in", 0)
    assert "blocks" not in groups.plan(budget=jc.flops(0.7)).units


@pytest.mark.parametrize("units", [[0], [1], [0, 1]])
def test_masked_equals_removed_with_channels_of_others(groups, units):
    others = {name: [1, 3] for name in ("stem:1", "layers/0/in:1", "layers/1/in:1")}
    plan = groups.plan({"blocks": units, **others})
    assert not plan.inexact
    law.check(net, PARAMS, (X,), plan)
    rewrite = plan.rewrite()
    assert jax.tree.map(jnp.shape, rewrite.params["layers"][units[0]])["in"][0] == 0
    products = [
        str(e.primitive) for e in _all(jax.make_jaxpr(rewrite.function(net))(rewrite.params, X))
    ]
    assert products.count("dot_general") == 3 + 2 * (2 - len(units))
    again = groups.plan(kept=json.loads(json.dumps(plan.kept)))
    assert again.kept == plan.kept and again.flops == plan.flops


def _all(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for inner in (v for v in e.params.values() if hasattr(v, "eqns")):
            yield from _all(inner)


def test_operations_scores_and_losses(groups):
    assert groups.plan({"blocks": [0]}).flops == (
        2 * 4 * (15 + 60 + 60 + 20),
        2 * 4 * (15 + 60 + 20),
    )
    entries = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)]) for p in PARAMS["layers"]]
    wanted = [np.sqrt(np.square(e).sum()) for e in entries]
    np.testing.assert_allclose(groups.scores()["blocks"], wanted, rtol=1e-6)
    loss = lambda p, x: jnp.mean(jnp.square(net(p, x)))
    got = groups.losses(loss, X, names=["blocks"])["blocks"]
    zeros = lambda i: {**PARAMS, "layers": [
        jax.tree.map(jnp.zeros_like, p) if i == j else p for j, p in enumerate(PARAMS["layers"])
    ]}  # fmt: skip
    np.testing.assert_allclose(got, [loss(zeros(i), X) for i in (0, 1)], rtol=1e-5)


def test_masks_store_nothing_of_a_block(groups):
    plan = groups.plan({"blocks": [1]})
    small = jc.compress(PARAMS, plan.compression, uses=jc.uses(net, PARAMS, X))
    assert not any(np.any(x) for x in jax.tree.leaves(jc.materialize(small)["layers"][1]))
    law.close(jc.materialize(small), plan.rewrite().undo(plan.rewrite().params), 0)


def test_groups_of_what_is_left(groups):
    rewrite = groups.plan({"blocks": [0]}).rewrite()
    g = rewrite.function(net)
    left = jc.find_groups(g, rewrite.params, X)
    assert [paths[0] for paths in left["blocks"].paths] == ["layers/1/b"]
    law.check(g, rewrite.params, (X,), left.plan({"stem:1": [0]}))


def test_what_is_no_block():
    """A gate that is a half where its weights are 0, shared weights, and a protected parameter."""
    shared = lambda p, x: (x + jnp.tanh(x @ p["w"])) @ p["w"]
    gate = lambda p, x: x + x * jax.nn.sigmoid(x @ p["w"])
    params = {"w": jnp.ones((3, 3))}
    for fn in (shared, gate):
        assert "blocks" not in jc.find_groups(fn, params, X)
    protected = jc.find_groups(net, PARAMS, X, protect="layers/1/b")["blocks"]
    assert len(protected) == 1 and protected.paths[0][0] == "layers/0/b"
    looked_up = jc.find_groups(lambda p, i: p["w"][i], params, jnp.arange(3))
    with pytest.raises(jc.NotRemovable, match="'w' cannot go as a whole: the function still reads"):
        looked_up.plan(kept={"w": {0: []}})


@pytest.mark.parametrize("model", ["resnet", "transformer"])
def test_blocks_of_models(model):
    """Attention and perceptrons before norms; convolutions with batch norms, before a relu."""
    make = {
        "resnet": lambda: linen(ResNet(), IMAGE),
        "transformer": lambda: linen(LM(depth=2), (2, 5), jnp.int32),
    }
    fn, params, x = make[model]()
    params = law.values(params)
    groups = jc.find_groups(fn, params, x)
    assert len(groups["blocks"]) == {"resnet": 2, "transformer": 4}[model]
    channels = next(name for name in groups if name.startswith("params/"))
    law.check(fn, params, (x,), groups.plan({"blocks": [1], channels: [0]}), rtol=2e-4)


def test_averages_of_a_block_follow():
    """In training, running averages depend on a block's weights, and are results too.

    Where they count, its weights do not go, and nothing would be saved.
    """

    def block(p, x):
        h = x @ p["w"]
        mean, var = h.mean(0), h.var(0)
        return x + (h - mean) * jax.lax.rsqrt(var + 1e-3) * p["s"] + p["b"], mean

    def objective(p, averages, x):
        found = []
        for own, old in zip(p["layers"], averages, strict=True):
            x, mean = block(own, x)
            found.append(0.9 * old + 0.1 * mean)
        return jnp.mean(jnp.square(x @ p["head"])), found

    own = {"b": jnp.ones(3), "s": jnp.ones(3), "w": jnp.ones((3, 3))}
    params = law.values({"head": jnp.ones((3, 2)), "layers": [own, own]})
    averages = [jnp.ones(3), jnp.ones(3)]
    assert "blocks" not in jc.find_groups(objective, params, averages, X)
    follow = ("in/0/**", "out/1/**")
    groups = jc.find_groups(objective, params, averages, X, follow=follow)
    assert [len(paths) for paths in groups["blocks"].paths] == [2, 2]
    plan = groups.plan({"blocks": [0]})
    assert plan.check(params, averages, X).relative < 1e-5


def test_a_scalar_gate_stays_and_is_not_read():
    """``x + a f(x)``, with a gate that is not 0."""
    gated = lambda p, x: (x + p["a"] * layer(p["f"], x)) @ p["head"]
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    f = {"in": draw(3, 6), "b": draw(6), "out": draw(6, 3)}
    params = {"a": jnp.float32(0.5), "f": f, "head": draw(3, 2)}
    groups = jc.find_groups(gated, params, X)
    assert groups["blocks"].paths == (("f/b", "f/in", "f/out"),)
    plan = groups.plan({"blocks": [0]})
    law.check(gated, params, (X,), plan)
    rewrite = plan.rewrite()
    assert rewrite.params["a"] == 0.5
    np.testing.assert_allclose(rewrite.function(gated)(rewrite.params, X), X @ params["head"])


def test_a_scalar_that_is_added_is_no_gate():
    added = lambda p, x: x + (jnp.tanh(x @ p["w"]) + p["a"])
    assert "blocks" not in jc.find_groups(added, {"a": jnp.float32(1), "w": jnp.ones((3, 3))}, X)
