"""Every solver on every kind of model: errors on held-out inputs, entries of stacks, and zeros."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression.output_error import output_error
from jaxopt_compress.tree import map_named, named_leaves
from tests.models import leaves_by_path
from tests.post_training.zoo import calibrated, model

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
MODELS = (
    "linen_attention",
    "linen_conv_net",
    "linen_tied_embedding",
    "linen_scanned_transformer",
    "nnx_conv_net",
    "nnx_attention",
    "equinox_conv_attention",
    "haiku_conv_net",
    "matmul",
    "scan_stack",
    "scan_nested",
    "einsum_experts",
    "vmap_models",
    "conv_depthwise",
    "conv_grouped",
    "ragged_dot",
)


@pytest.fixture(scope="module")
def own(request):
    """A model. What was compiled for it is forgotten after it: for all of them it is too much."""
    yield model(request.param)
    jax.clear_caches()


def on(*names):
    """A test of several models; the cheapest one runs in the second line."""
    marks = lambda name: pytest.mark.ci if name == "einsum_experts" else pytest.mark.slow
    given = [pytest.param(name, marks=marks(name), id=name) for name in names]
    return pytest.mark.parametrize("own", given, indirect=True)


MSE = jc.bounds.mse()
BY_MAGNITUDE = (jc.scores.magnitude(), jc.schedules.constant(0.5))


def least_squares(where):
    return jc.quantize("int3", where=where, bounds=MSE)


def pruned(where):
    return jc.prune(*BY_MAGNITUDE, where=where)


def pruned_and_rounded(where):
    return jc.chain(pruned(where), least_squares(where))


class Solver(NamedTuple):
    """A method and what it is compared with: on the same grid, or with as many zeros.

    Attributes:
        make: ``make(paths)``.
        plain: What decides each entry by itself.
        least: The share of the other's error on held-out inputs that it has at most.
        never_worse: Whether no parameter's error on the inputs of calibration may be larger.
    """

    make: Callable[[Any], jc.Compression]
    plain: Callable[[Any], jc.Compression]
    least: float = 1.0
    never_worse: bool = False


GROUPS = {"group_size": 4, "pad": True, "bounds": MSE}
SOLVERS = {
    "gptq": Solver(lambda w: jc.gptq("int3", where=w, bounds=MSE), least_squares),
    "gptq-in-order-of-rows": Solver(
        lambda w: jc.gptq("int3", where=w, bounds=MSE, act_order=False), least_squares
    ),
    "gptq-groups": Solver(
        lambda w: jc.gptq("int2", where=w, symmetric=False, **GROUPS),
        lambda w: jc.quantize("int2", where=w, symmetric=False, **GROUPS),
    ),
    "auto_round": Solver(
        lambda w: jc.auto_round("int3", where=w, bounds=MSE), least_squares, never_worse=True
    ),
    "auto_round-relaxed": Solver(
        lambda w: jc.auto_round("int3", where=w, bounds=MSE, method="relaxed", steps=200),
        least_squares,
        never_worse=True,
    ),
    # Its grids count errors input by input, and ignore that inputs are correlated here.
    "awq": Solver(lambda w: jc.awq("int3", where=w), least_squares, 1.02),
    "sparse_gpt": Solver(lambda w: jc.sparse_gpt(0.5, where=w), pruned),
    "reconstruct": Solver(lambda w: jc.chain(pruned(w), jc.reconstruct(w)), pruned),
    "prune, gptq": Solver(
        lambda w: jc.chain(pruned(w), jc.gptq("int3", where=w, bounds=MSE)), pruned_and_rounded
    ),
    "prune, auto_round": Solver(
        lambda w: jc.chain(pruned(w), jc.auto_round("int3", where=w, bounds=MSE)),
        pruned_and_rounded,
    ),
    "low_rank_correction": Solver(
        lambda w: jc.low_rank_correction(least_squares(w), 1, w, whiten=True), least_squares
    ),
}


def named(tree):
    """Path -> leaf, compressed ones whole."""
    return dict(named_leaves(tree))


def errors(own, small, stats):
    """The relative error of the products with each parameter, on inputs of these statistics."""
    leaves, found = leaves_by_path(own.params), named(small)
    error = lambda p: output_error(leaves[p], jc.materialize(found[p]), stats[p][0]).whole
    return np.array([float(error(p)) for p in own.paths])


@functools.cache
def plainly(name, plain):
    own = model(name)
    return jc.compress(own.params, plain(own.paths), **own.given)


@pytest.mark.parametrize("solver", SOLVERS)
@on(*MODELS)
def test_products_are_nearer_than_by_rounding_each_entry(own, solver):
    method = SOLVERS[solver]
    small = jc.compress(own.params, method.make(own.paths), **own.given)
    plain = plainly(own.name, method.plain)
    got, want = (errors(own, x, own.held_out) for x in (small, plain))
    # Where every entry is on a grid of its own, both are off by no more than float32 is.
    assert got.mean() < method.least * want.mean() + 1e-6
    # A parameter by itself may be worse, on the few rows that these models have.
    assert np.all(got < 1.2 * want + 1e-6)
    if method.never_worse:
        got, want = (errors(own, x, own.given["stats"]) for x in (small, plain))
        assert np.all(got < (1 + 1e-5) * want + 1e-6)


# Grids that are chosen by the weights alone: the promise is a norm of their errors, and none of
# products, whose errors may be larger.
BY_WEIGHTS = {
    "hqq": (
        0.7,
        lambda w: jc.hqq("int3", where=w, symmetric=False, power=0.7),
        lambda w: jc.quantize("int3", where=w, symmetric=False),
    ),
    "mse": (2.0, least_squares, lambda w: jc.quantize("int3", where=w)),
}


@pytest.mark.parametrize("method", BY_WEIGHTS)
@on(*MODELS)
def test_weights_are_nearer_in_the_norm_that_chooses_their_grid(own, method):
    power, *methods = BY_WEIGHTS[method]
    leaves = leaves_by_path(own.params)

    def norms(c):
        values = leaves_by_path(jc.materialize(jc.compress(own.params, c, **own.given)))
        wrong = lambda p: np.abs(np.asarray(values[p], np.float64) - leaves[p])
        return np.array([np.sum(wrong(p) ** power) for p in own.paths])

    got, want = (norms(make(own.paths)) for make in methods)
    assert np.all(got <= (1 + 1e-5) * want) and got.sum() < want.sum()


# A model of each library, one of each kind of stack, and one that uses a parameter twice.
WALKED = (
    "linen_attention",
    "linen_tied_embedding",
    "nnx_conv_net",
    "equinox_conv_attention",
    "haiku_conv_net",
    "scan_stack",
    "einsum_experts",
    "conv_depthwise",
)
IN_ORDER = {
    **{k: SOLVERS[k] for k in ("gptq", "auto_round", "sparse_gpt", "low_rank_correction")},
    "smooth_quant": Solver(
        lambda w: jc.smooth_quant("int8", where=w, activations="int4"),
        lambda w: jc.quantize("int8", where=w, activations="int4"),
        # Scales follow from ranges and are not searched. They are for outliers: few inputs are some
        # here, and where none is, weights lose more than activations gain.
        1.25,
    ),
}


@pytest.mark.parametrize("solver", IN_ORDER)
@on(*WALKED)
def test_functions_are_nearer_layer_after_layer(own, solver):
    make, plain, least, _ = IN_ORDER[solver]
    small = in_order(own, make(own.paths))
    at_once = jc.compress(own.params, make(own.paths), **own.given)
    assert jax.tree.structure(small) == jax.tree.structure(at_once)
    least *= 1.1 if own.name == "equinox_conv_attention" else 1  # Few rows, behind a softmax.
    assert apart(own, small) < least * plain_in_order(own.name, plain)


def in_order(own, c):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jc.compress_in_order(own.fn, own.params, c, own.seen, progress=False)


@functools.cache
def plain_in_order(name, plain):
    own = model(name)
    return apart(own, in_order(own, plain(own.paths)))


def apart(own, small):
    """The relative error of the function on inputs that were not calibrated on."""
    wrong = whole = 0.0
    for args in own.unseen[:2]:
        got, want = jc.lift(own.fn)(small, *args), own.fn(own.params, *args)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            wrong, whole = wrong + float(jnp.sum((a - b) ** 2)), whole + float(jnp.sum(b**2))
    return (wrong / whole) ** 0.5


@on(*(n for n in WALKED if n != "conv_depthwise"))
def test_rotated_functions_are_solved_as_others_are(own):
    rw = jc.rotate_inputs(own.fn, own.params, *own.seen[0], where=own.paths)
    fn = rw.function(own.fn)
    assert rw.check(own.fn, *own.seen[0]).relative < 1e-5
    given = {"uses": jc.uses(fn, rw.params, *own.seen[0])}
    given["stats"] = calibrated(fn, rw.params, own.seen)
    turned = own._replace(fn=fn, params=rw.params)
    methods = (jc.gptq("int3", where=own.paths, bounds=MSE), least_squares(own.paths))
    got, want = (apart(turned, jc.compress(rw.params, c, **given)) for c in methods)
    assert got < want


@pytest.mark.parametrize("solver", ["gptq", "sparse_gpt", "auto_round"])
@on("linen_conv_net", "haiku_conv_net", "equinox_conv_attention")
def test_biases_make_up_for_any_solver(own, solver):
    """Behind each weight, where only that one was compressed, the means are as they were.

    Those of the whole function need not be nearer: behind layers that are half pruned, inputs have
    other means, and functions between layers do not keep them.
    """
    small = jc.compress(own.params, SOLVERS[solver].make(own.paths), **own.given)
    rw = jc.correct_biases(own.fn, own.params, small, *own.seen[0], stats=own.given["stats"])
    corrected = [path for path in own.paths if path not in rw.skipped]
    layer = lambda path: path.rpartition("/")[0]
    shifts = {layer(bias): shift for bias, shift in rw.shifts.items()}
    assert set(shifts) == set(map(layer, corrected)) and len(corrected) > 1
    values = leaves_by_path(jc.materialize(small))
    for path in corrected:
        shift = shifts[layer(path)]
        alone = map_named(lambda p, w, path=path: values[p] if p == path else w, own.params)
        want, plain = (mean_behind(own, path, p, shift.size) for p in (own.params, alone))
        gap = np.abs(plain + np.ravel(shift) - want).max()
        assert gap < 1e-3 * np.abs(plain - want).max() + 1e-6


def mean_behind(own, path, params, size):
    """The mean of each of the channels that are made with a weight, over all batches."""
    behind = jax.jit(jc.capture(own.fn, at=path))
    found = [behind(params, *args)[1][path][0] for args in own.seen]
    axis = found[0].shape.index(size)
    return np.mean([np.mean(np.moveaxis(x, axis, -1), tuple(range(x.ndim - 1))) for x in found], 0)
