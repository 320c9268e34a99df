"""Solvers on models of every library: nearer outputs than by rounding, also on held-out inputs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression.output_error import output_error
from jaxopt_compress.tree import named_leaves
from tests.models import CASES, leaves_by_path

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")

ZOO = {case.name: case for case in CASES}
SOLVED = {
    "linen_attention": "gptq",
    "linen_conv_net": "gptq",
    "linen_tied_embedding": "awq",
    "linen_scanned_transformer": "gptq",
    "nnx_conv_net": "gptq",
    "equinox_conv_attention": "gptq",
    "haiku_conv_net": "auto_round",
    "einsum_experts": "gptq",
}


@pytest.mark.ci
@pytest.mark.fast("linen_attention", "einsum_experts")
@pytest.mark.parametrize("case", SOLVED)
def test_every_kind_of_model_gets_nearer_outputs_than_by_rounding(case):
    fn, params, args = ZOO[case].make()
    uses = jc.uses(fn, params, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = jc.calibrate(fn, params, [args])
    paths = [p for p in stats if any(u.contracting for u in uses.get(p, ()))]
    given = {"uses": uses, "stats": stats}
    method = getattr(jc, SOLVED[case])("int3", where=paths)
    small = jc.compress(params, method, **given)
    nearest = jc.compress(params, jc.quantize("int3", where=paths, bounds=jc.bounds.mse()), **given)
    leaves, sides = leaves_by_path(params), [named(small), named(nearest)]
    errors = np.array(
        [
            [float(output_error(leaves[p], x[p].materialize(), stats[p][0]).whole) for x in sides]
            for p in paths
        ]
    )
    assert errors[:, 0].mean() < errors[:, 1].mean()
    # And each of them is at most a little worse.
    assert np.all(errors[:, 0] < 1.1 * errors[:, 1] + 1e-6)
    got, want = jc.lift(fn)(small, *args), fn(jc.materialize(small), *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-6)


def nearest(where):
    return jc.quantize("int3", where=where)


def least_squares(where):
    return jc.quantize("int3", where=where, bounds=jc.bounds.mse())


def pruned(where):
    return jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), where=where)


# What each solver is to be better than, on the same grid or at the same sparsity.
SOLVERS = {
    "gptq": (lambda where: jc.gptq("int3", where=where), least_squares),
    "auto_round": (lambda where: jc.auto_round("int3", where=where), least_squares),
    "awq": (lambda where: jc.awq("int3", where=where), least_squares),
    "hqq": (lambda where: jc.hqq("int3", where=where), nearest),
    "sparse_gpt": (lambda where: jc.sparse_gpt(0.5, where=where), pruned),
    "reconstruct": (lambda where: jc.chain(pruned(where), jc.reconstruct(where)), pruned),
    "low_rank_correction": (
        lambda where: jc.low_rank_correction(nearest(where), 1, where, whiten=True),
        nearest,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linen_conv_net"])
def test_every_solver_gets_nearer_outputs_on_held_out_inputs(case):
    """On inputs that were not calibrated on."""
    fn, params, args = ZOO[case].make()
    uses = jc.uses(fn, params, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = jc.calibrate(fn, params, [like(args, i) for i in range(16)])
        held_out = jc.calibrate(fn, params, [like(args, i) for i in range(16, 24)])
    paths = [p for p in stats if any(u.contracting for u in uses.get(p, ()))]
    given, leaves = {"uses": uses, "stats": stats}, leaves_by_path(params)

    def errors(c):
        small = named(jc.compress(params, c, **given))
        return np.array(
            [
                float(output_error(leaves[p], small[p].materialize(), held_out[p][0]).whole)
                for p in paths
            ]
        )

    for name, (method, plain) in SOLVERS.items():
        got, want = errors(method(paths)), errors(plain(paths))
        assert got.mean() < want.mean(), name
    method = jc.gptq("int3", where=paths)
    small = jc.compress(params, method, **given)
    got, want = jc.lift(fn)(small, *args), fn(jc.materialize(small), *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-6)


def like(args, seed):
    """Other inputs of the same kind: the same rows in another order; columns stay correlated."""
    rng = np.random.default_rng(seed)
    rows = lambda x: rng.permutation(np.reshape(x, (-1, np.shape(x)[-1])))
    return jax.tree.map(lambda x: jnp.asarray(rows(x).reshape(x.shape), x.dtype), args)


def named(tree):
    """Path -> leaf, compressed ones whole."""
    return dict(named_leaves(tree))
