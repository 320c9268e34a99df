"""Parameters on meshes whose axes are explicit: every method decides and stores them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc

PRUNE = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
METHODS = {
    "prune": PRUNE,
    "prune, quantize": jc.chain(PRUNE, jc.quantize("int8")),
    "2:4": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"),
    "low rank, quantize": jc.chain(jc.low_rank(rank=4), jc.quantize("int8")),
    "recipe": jc.chain({"w": jc.low_rank(energy=0.9)}),
    "percentile": jc.quantize("int4", bounds=jc.bounds.percentile(99.0)),
    "entropy": jc.quantize("int4", bounds=jc.bounds.entropy()),
    "groups": jc.quantize("int4", 32),
    "learned groups": jc.lsq("int4", group_size=32),
    "mxfp4": jc.quantize("mxfp4"),
    "words": jc.quantize("int3"),
}


COLUMNS = pytest.param(P(None, "model"), marks=pytest.mark.slow)


# Others are found, applied and stored in the same ways as those that run by default.
ALIKE = ("2:4", "recipe", "words", "groups", "prune", "learned groups")
STORED = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else []) for name in METHODS]


@pytest.mark.fast(
    "2:4-P(None, 'model')",
    "low rank, quantize-P('model', None)",
    "groups-P('model', None)",
    "words-P(None, 'model')",
)
@pytest.mark.parametrize("spec", [P("model", None), COLUMNS], ids=str)
@pytest.mark.parametrize("name", STORED)
@pytest.mark.ci
def test_explicit_axes(name, spec):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    w = jnp.sin(jnp.arange(64.0 * 64)).reshape(64, 64)
    c, where = METHODS[name], NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, where)}
        state = c.init(params)
        view = jax.jit(c.apply)(params, state)["w"]
        small = c.compress(params, state)
        stored = jc.materialize(small)["w"]
    arrays = jax.tree.leaves((state, small))
    assert all(x.sharding.mesh == mesh for x in arrays if isinstance(x.sharding, NamedSharding))
    np.testing.assert_array_equal(stored, view)
    assert np.linalg.norm(view - w) < np.linalg.norm(w)


# Of each way to find a range, one runs by default.
OTHERS = ("prune", "2:4", "entropy", "words", "learned groups", "mxfp4")
RENEWED = [
    pytest.param(name, marks=pytest.mark.slow if name in OTHERS else [])
    for name in METHODS
    if "low rank" not in name and name != "recipe"
]


@pytest.mark.fast("prune, quantize-P(None, 'model')", "groups-P('model', None)")
@pytest.mark.parametrize("spec", [P("model", None), COLUMNS], ids=str)
@pytest.mark.parametrize("name", RENEWED)
def test_updates_under_jit(name, spec):
    """A training step decides anew where types say how arrays are split."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    w = jnp.sin(jnp.arange(64.0 * 64)).reshape(64, 64)
    c = METHODS[name]
    state = c.init({"w": w})
    want = jax.jit(c.update)(state, {"w": 1.5 * w})
    with jax.set_mesh(mesh):
        own = {"w": jax.device_put(1.5 * w, NamedSharding(mesh, spec))}
        got = jax.jit(c.update)(state, own)
        view = jax.jit(c.apply)(own, got)["w"]
    chex.assert_trees_all_equal(got, want)
    assert view.sharding.is_equivalent_to(own["w"].sharding, 2)
