"""Lifted functions on several devices: meshes of both kinds, shard_map and pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.lift.compressed import KINDS, assert_close
from tests.lift.layer import SMALL, W, X, dense_layer


def _mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.fast(
    "int8-P('model', None)-AxisType.Explicit",
    "int4_groups-P('model', None)-AxisType.Auto",
    "two_of_four-P(None, 'model')-AxisType.Explicit",
    "low_rank-P(None, 'model')-AxisType.Auto",
)
@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("spec", [P("model", None), P(None, "model")], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4_groups", "two_of_four", "low_rank"])
def test_sharded_weights_on_meshes_of_both_kinds(kind, spec, axes):
    """One layer is left to the compiler; the other is a shard_map of its own."""
    mesh = _mesh(axes)
    params = {
        "first": jnp.sin(jnp.arange(32.0 * 32)).reshape(32, 32),
        "second": jnp.cos(jnp.arange(32.0 * 32)).reshape(32, 32),
    }
    x = jnp.cos(jnp.arange(8.0 * 32)).reshape(8, 32) / 8
    summed = spec[0] is not None
    # A product over a split axis has to say where its sum goes, if axes are explicit.
    where = NamedSharding(mesh, P()) if axes == AxisType.Explicit else None

    def local(w, h):
        y = h @ w
        return jax.lax.psum(y, "model") if summed else y

    def model(params, x):
        h = jnp.tanh(jnp.dot(x, params["first"], out_sharding=where))
        inner, outer = (
            (P("data", "model"), P("data")) if summed else (P("data"), P("data", "model"))
        )
        if axes == AxisType.Explicit:
            h = jax.sharding.reshard(h, inner)
        return jax.shard_map(local, mesh=mesh, in_specs=(spec, inner), out_specs=outer)(
            params["second"], h
        )

    small = jc.compress(params, KINDS[kind])
    expected = jnp.tanh(x @ small["first"].materialize()) @ small["second"].materialize()
    placed = jc.shard(small, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        got = jax.jit(jc.lift(model, "error"))(placed, x)
    assert_close(np.asarray(got), np.asarray(expected))


def test_a_form_that_a_shard_map_cannot_split_is_reported():
    mesh = _mesh(AxisType.Auto)
    small = jc.compress({"w": W}, KINDS["sparse"])
    model = jax.shard_map(
        lambda params, x: x @ params["w"],
        mesh=mesh,
        in_specs=(P(None, "model"), P()),
        out_specs=P(None, "model"),
    )
    with pytest.raises(jc.FallbackError, match=r"'shard_map'.*'w'"):
        jc.lift(model, "error")(small, X)
    got = jax.jit(jc.lift(model, "densify"))(small, X)
    assert_close(got, X @ small["w"].materialize())


def test_groups_that_a_shard_map_would_cut_are_reported():
    mesh = _mesh(AxisType.Auto)
    halves = mesh.shape["model"]
    small = jc.compress({"w": W}, jc.quantize("int4", group_size=8))  # twice a shard
    model = jax.shard_map(
        lambda params, x: jax.lax.psum(x @ params["w"], "model"),
        mesh=mesh,
        in_specs=(P("model"), P(None, "model")),
        out_specs=P(),
    )
    assert halves > 1
    with pytest.raises(jc.FallbackError, match=r"'shard_map'.*'w'"):
        jc.lift(model, "error")(small, X)
    got = jax.jit(jc.lift(model, "densify"))(small, X)
    assert_close(got, X @ small["w"].materialize())


def test_pmap_of_a_lifted_function():
    replicas = jax.tree.map(lambda a: jnp.stack([a] * 8), SMALL)
    xs = jnp.stack([X * i for i in range(8)])
    expected = jax.vmap(lambda x: dense_layer(jc.materialize(SMALL), x))(xs)
    assert_close(jax.pmap(jc.lift(dense_layer, "error"))(replicas, xs), expected)
