"""States of optimizers lie where their parameters lie."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc

SPECS = {"bias": P("model"), "head": {"kernel": P("data", "model"), "bias": P()}}
SHAPES = {"bias": (8,), "head": {"kernel": (64, 16), "bias": (16,)}}


def given():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda spec: NamedSharding(mesh, spec)
    shapes = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return shapes, jax.tree.map(place, SPECS, is_leaf=lambda x: isinstance(x, P))


@pytest.mark.ci
def test_moments_masks_and_scales_follow_parameters():
    params, shardings = given()
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), where="head/kernel")
    c = jc.chain(prune, jc.quantize("int4", 16, where="head/kernel"))
    tx = jc.compressed_training(optax.adam(1e-3), c, layout="in,out")
    state = jax.eval_shape(tx.init, params)
    specs = jax.tree.map(lambda s: s.spec, jc.state_shardings(state, params, shardings))
    # The longest path decides: "bias" is the end of "head/bias" too.
    mu = specs.inner[0].mu
    assert mu["bias"] == P("model") and mu["head"]["bias"] == P(None)
    assert mu["head"]["kernel"] == P("data", "model") and specs.inner[0].count == P()
    leaves = list(zip(jax.tree.leaves(specs), jax.tree.leaves(state), strict=True))
    # Moments and masks; and scales of four groups, which four devices share.
    for shape in ((64, 16), (4, 16)):
        found = [spec for spec, x in leaves if x.shape == shape]
        assert found and set(found) == {P("data", "model")}
    placed = jc.shard(tx.init(params), jc.state_shardings(state, params, shardings))
    assert placed.inner[0].mu["head"]["kernel"].addressable_shards[0].data.shape == (16, 8)


@pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
def test_compressed_moments():
    params, shardings = given()
    tx = jc.small_states(optax.adam(1e-3), block=16, min_size=512)
    state = jax.eval_shape(tx.init, params)
    placed = jc.shard(state, jc.state_shardings(state, params, shardings))
    mu = placed.inner[0].mu["head"]["kernel"]
    assert mu.codes.sharding.spec == P("data", "model")
