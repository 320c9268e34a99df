"""Functions on a mesh: shards, what devices tell each other, and axes that types name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.removal import law

pytestmark = pytest.mark.ci

X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
PARAMS = law.values({"b": jnp.ones(8), "v": jnp.ones((8, 2)), "w": jnp.ones((3, 8))})


def mesh(kind=AxisType.Auto):
    return jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4]
    )


def sharded(fn, *specs, out=None):
    return jax.shard_map(fn, mesh=mesh(), in_specs=specs, out_specs=out or P("data", None))


def by_rows(p, x):
    """Each device has some rows and all weights."""
    call = lambda x, w, b, v: jax.nn.relu(x @ w + b) @ v
    return sharded(call, P("data", None), P(), P(), P())(x, p["w"], p["b"], p["v"])


def by_hidden_units(p, x):
    """Each device has some hidden units; their shares of the results are summed."""
    call = lambda x, w, b, v: lax.psum(jax.nn.relu(x @ w + b) @ v, "model")
    specs = P("data", None), P(None, "model"), P("model"), P("model", None)
    return sharded(call, *specs)(x, p["w"], p["b"], p["v"])


def gathered(p, x):
    """Hidden units are gathered again, and leave the function that runs on shards."""
    call = lambda x, w, b: lax.all_gather(jax.nn.relu(x @ w + b), "model", axis=1, tiled=True)
    specs = P("data", None), P(None, "model"), P("model")
    h = jax.shard_map(call, mesh=mesh(), in_specs=specs, out_specs=P("data"), check_vma=False)
    return h(x, p["w"], p["b"]) @ p["v"]


def out_of_shards(p, x):
    call = lambda x, w, b: jnp.tanh(x @ w + b)
    specs = P("data", None), P(None, "model"), P("model")
    return sharded(call, *specs, out=P("data", "model"))(x, p["w"], p["b"]) @ p["v"]


CASES = {by_rows: 8, by_hidden_units: 4, gathered: 4, out_of_shards: 4}


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_masked_equals_removed(fn):
    """Where hidden units are split over two devices, a unit takes one of each."""
    groups = jc.find_groups(fn, PARAMS, X)
    assert {k: len(g) for k, g in groups.items()} == {"w:1": CASES[fn]}
    plan = groups.plan({"w:1": [0, 2]})
    assert not plan.inexact and plan.flops[0] == 2 * 4 * 8 * 5 * (2 if fn is by_rows else 1)
    law.check(fn, PARAMS, (X,), plan)


def test_constrained_values():
    own = mesh()
    pin = lambda x, *spec: lax.with_sharding_constraint(x, NamedSharding(own, P(*spec)))
    fn = lambda p, x: pin(jax.nn.relu(pin(x @ p["w"] + p["b"], "data", "model")), "data") @ p["v"]
    groups = jc.find_groups(fn, PARAMS, X)
    law.check(fn, PARAMS, (X,), groups.plan({"w:1": [0, 5]}, round_to=2))
    law.check(fn, PARAMS, (X,), groups.plan({"w:1": [0]}))


def test_axes_that_types_name():
    """Of an explicit mesh, through what states its sharding: reshapes, broadcasts and products."""
    own = mesh(AxisType.Explicit)

    def fn(p, x):
        h = jnp.einsum("bi,ih->bh", x, p["w"], out_sharding=P("data", "model")) + p["b"]
        h = jax.nn.relu(h.reshape(4, 8)) + jnp.broadcast_to(p["b"][None], (4, 8))
        h = h * jnp.arange(8, out_sharding=P("model"))
        return jnp.einsum("bh,ho->bo", h, p["v"], out_sharding=P("data"))

    with jax.set_mesh(own):
        put = lambda x, *spec: jax.device_put(x, NamedSharding(own, P(*spec)))
        params = {
            "b": put(PARAMS["b"], "model"),
            "v": put(PARAMS["v"], "model", None),
            "w": put(PARAMS["w"], None, "model"),
        }
        x = put(X, "data", None)
        groups = jc.find_groups(fn, params, x)
        plan = groups.plan({"w:1": [1, 6]})
        rewrite = plan.rewrite()
        got = jax.jit(rewrite.function(fn))(rewrite.params, x)
        assert jax.typeof(got) == jax.typeof(fn(params, x))
        law.close(got, fn(rewrite.undo(rewrite.params), x), 1e-5)
