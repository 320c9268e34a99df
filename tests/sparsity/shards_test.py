"""Masks that change while training, of parameters that are split among devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxopt_compress as jc
from jaxopt_compress.compression.states import compression_states

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")


def states_of(state):
    return compression_states(state)[0].leaves


@pytest.mark.slow
def test_growth_stays_where_the_parameters_are():
    """Masks of sharded parameters: as on one device, and devices tell each other counts only."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    shapes = {"a": (256, 128), "b": (64, 128)}
    params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x", "y")))
    c = jc.prune(
        jc.scores.magnitude(),
        jc.schedules.constant(0.8, every=1),
        scope="global",
        grow=jc.grow.by_gradient(0.3),
    )
    tx = jc.compressed_training(optax.sgd(0.1, momentum=0.9), c)
    results = []
    for where in (params, spread):
        init, update = jax.jit(tx.init), jax.jit(tx.update)
        now, opt_state = where, init(where)
        grads = jax.device_put(jax.tree.map(jnp.cos, params), where["a"].sharding)
        for _ in range(2):
            updates, opt_state = update(grads, opt_state, now)
            now = optax.apply_updates(now, updates)
        results.append((now, states_of(opt_state)))
    text = update.lower(grads, opt_state, now).compile().as_text()
    alone, shared = results
    for k in params:
        assert shared[1][k].mask.sharding.is_equivalent_to(spread[k].sharding, 2)
        np.testing.assert_array_equal(shared[1][k].mask, alone[1][k].mask)
        np.testing.assert_array_equal(shared[0][k], alone[0][k])
    found = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)\(", text)
    sizes = [
        int(np.prod([int(d) for d in dims.split(",") if d], initial=1))
        for types in found
        for dims in re.findall(r"\[([\d,]*)\]", types)
    ]
    assert found and max(sizes) <= 32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["global", "2:4", "block:16x16", "rigl", "lamp"])
def test_no_parameter_is_gathered(name):
    """In the program that renews masks on 8 devices: what they send is counts, or scores of few."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec("x", "y"))
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    params = {"a": leaf(256, 128), "b": leaf(64, 128)}
    grow = jc.grow.by_gradient(0.3) if name == "rigl" else None
    pattern = name if ":" in name else None
    often = jc.schedules.constant(0.5, every=1)
    scope = "global" if name == "global" else None
    score = jc.scores.lamp() if name == "lamp" else jc.scores.magnitude()
    c = jc.prune(score, often, pattern, scope=scope, grow=grow)
    state = jax.eval_shape(lambda p: c.init(p, uses=None), params)
    update = jax.jit(lambda s, p, g: c.update(s, p, grads=g), out_shardings=None)
    text = update.lower(state, params, params).compile().as_text()
    found = re.findall(r"= (.*?) all-gather\(", text)
    shapes = [dims for types in found for dims in re.findall(r"\[([\d,]*)\]", types)]
    largest = max((int(np.prod([int(d) for d in x.split(",") if d])) for x in shapes), default=0)
    # A device holds 1024 entries of the smaller parameter; there are 160 blocks.
    assert largest >= 1024 if name == "lamp" else largest <= 512
