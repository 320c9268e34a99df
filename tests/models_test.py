"""The zoo itself: its models run and are differentiable, and its answers are complete."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import CASES, leaves_by_path


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def made(case):
    """A case's function, parameters and arguments."""
    return case.make()


def _matrices(params):
    return {path: leaf for path, leaf in leaves_by_path(params).items() if leaf.ndim >= 2}


def _projection(out):
    """A scalar that every entry of the outputs reaches with its own weight."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(out)]
    return sum(jnp.vdot(jnp.cos(7.0 * jnp.arange(x.size)).reshape(x.shape), x) for x in leaves)


def test_names_are_unique():
    assert not [name for name, n in collections.Counter(c.name for c in CASES).items() if n > 1]


def test_parameters_are_float32(made):
    _, params, _ = made
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.ci
@pytest.mark.fast(
    "linen_attention",
    "linen_gru",
    "linen_scanned_transformer",
    "nnx_conv_net",
    "equinox_conv_attention",
    "haiku_lstm",
    "einsum_experts",
    "gather",
    "conv_grouped",
    "ragged_dot",
    "scan_nested",
    "while_loop",
    "cond",
    "custom_vjp_of_weight",
    "checkpoint_policy",
    "shard_map_tensor_parallel",
)
def test_runs_under_jit_and_derivatives_are_finite_and_nonzero(case, made):
    fn, params, args = made

    def loss(params):
        out = fn(params, *args)
        return _projection(out), out

    if case.reverse:
        grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        slopes = leaves_by_path(grads)
    else:
        leaves, treedef = jax.tree.flatten(params)
        zeros = [np.zeros_like(leaf) for leaf in leaves]

        @jax.jit
        def along(tangents):
            primals, tangents = (params,), (jax.tree.unflatten(treedef, tangents),)
            return jax.jvp(lambda params: loss(params)[0], primals, tangents)[1]

        tangents = [[*zeros[:i], leaf, *zeros[i + 1 :]] for i, leaf in enumerate(leaves)]
        slopes = dict(zip(leaves_by_path(params), map(along, tangents), strict=True))
        out = jax.jit(fn)(params, *args)

    # By NumPy, which compiles nothing.
    assert all(np.isfinite(np.asarray(leaf, "float32")).all() for leaf in jax.tree.leaves(out))
    for path, leaf in _matrices(params).items():
        slope = np.abs(np.asarray(slopes[path])).max()
        assert np.isfinite(slope) and slope > 1e-3, (path, leaf.shape, slope)


def test_every_matrix_has_an_answer(case, made):
    _, params, _ = made
    assert set(case.uses) == set(_matrices(params))


def test_axes_partition_the_parameter(case, made):
    _, params, _ = made
    for path, leaf in _matrices(params).items():
        for use in case.uses[path]:
            kinds = (use.contracting, use.output, use.stack, use.batch, use.gathered)
            assert all(list(axes) == sorted(axes) for axes in kinds), (path, use)
            assert sorted(sum(kinds, ())) == list(range(-leaf.ndim, 0)), (path, leaf.shape, use)
            assert use.count is None or use.count >= 1, (path, use)
            # Groups of eight fit into every contraction.
            assert math.prod(leaf.shape[axis] for axis in use.contracting or (-1,)) % 8 == 0


def test_counts_follow_the_entries_of_one_use(case):
    for path, uses in case.uses.items():
        kinds = [use._replace(count=0) for use in uses]
        assert len(kinds) == len(set(kinds)), f"{path}: uses that differ in count only are one"


def test_ops_are_in_the_jaxpr(case, made):
    fn, params, args = made
    text = str(jax.make_jaxpr(fn)(params, *args))
    for use in {use for uses in case.uses.values() for use in uses}:
        assert f"= {use.op}[" in text, use
    for primitive in case.expanded:
        assert f"= {primitive}[" in text, primitive


def test_models_are_small(made):
    _, params, args = made
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 2**14
    assert all(math.prod(leaf.shape) < 2**12 for leaf in jax.tree.leaves(args))
