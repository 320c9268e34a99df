"""Solvers on what is unusual: activations that are not finite, other dtypes, axes and uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import NeedsStats

MSE = jc.bounds.mse()
SOLVERS = {
    "gptq": lambda: jc.gptq("int3", where="w"),
    "auto_round": lambda: jc.auto_round("int3", where="w", steps=20),
    "awq": lambda: jc.awq("int3", where="w"),
    "smooth_quant": lambda: jc.smooth_quant(where="w"),
    "sparse_gpt": lambda: jc.sparse_gpt(0.5, where="w"),
    "reconstruct": lambda: jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), where="w"), jc.reconstruct("w")
    ),
    "wanda": lambda: jc.prune(jc.scores.wanda(), jc.schedules.constant(0.5), where="w"),
    "mean_activation": lambda: jc.prune(
        jc.scores.mean_activation(), jc.schedules.constant(0.5), where="w", pattern="inputs"
    ),
    "low_rank_correction": lambda: jc.low_rank_correction(
        jc.quantize("int3", where="w"), 2, "w", whiten=True
    ),
    "calibrated": lambda: jc.quantize(
        "int8", where="w", activations=jc.activations("int8", "calibrated")
    ),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def product(params, x):
    return x @ params["w"] + params["b"]


PARAMS = {"w": normal(0, 16, 8), "b": jnp.zeros(8)}
X = normal(1, 64, 8) @ normal(2, 8, 16)


def compressed(fn, params, c, x):
    return jc.compress(params, c, uses=jc.uses(fn, params, x), stats=jc.calibrate(fn, params, [x]))


@functools.cache
def spoiled(bad):
    measures = (jc.measures.moments(), jc.measures.ranges(), jc.measures.means())
    return jc.calibrate(product, PARAMS, [X, X.at[3, 2].set(bad)], measures=measures)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("solver", SOLVERS)
def test_activations_that_are_not_finite_are_refused(solver, bad):
    """And are not taken for no activations at all, nor passed on to scales."""
    uses, stats = jc.uses(product, PARAMS, X), spoiled(bad)
    with pytest.raises(ValueError, match=r"measured for 'w' of shape \(16, 8\).* are infinite or"):
        jc.compress(PARAMS, SOLVERS[solver](), uses=uses, stats=stats)


@pytest.mark.ci
def test_rewrites_refuse_activations_that_are_not_finite():
    small = jc.compress(PARAMS, jc.quantize("int3", where="w"), uses=jc.uses(product, PARAMS, X))
    with pytest.raises(ValueError, match="the means measured for 'w' are infinite or NaN"):
        jc.correct_biases(product, PARAMS, small, X, stats=spoiled(np.nan))
    fn = lambda p, x: (x * p["s"]) @ p["w"]
    params = {"s": jnp.ones(16), "w": PARAMS["w"]}
    stats = jc.calibrate(fn, params, [X.at[0, 0].set(jnp.nan)])
    with pytest.raises(ValueError, match="the ranges measured for 'w' are infinite or NaN"):
        jc.smooth(fn, params, X, stats=stats)


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("auto_round", "awq", "sparse_gpt")]


@pytest.mark.ci
@pytest.mark.parametrize("solver", ["gptq", "smooth_quant", *LONG])
def test_a_stack_may_have_its_axis_last(solver):
    """Magnitudes vary along all axes, so that no two of them can be mistaken for each other."""
    vary = lambda n: np.geomspace(0.1, 10, n)
    w = normal(3, 3, 8, 6) * vary(3)[:, None, None] * vary(8)[:, None] * vary(6)
    x = normal(4, 3, 64, 8) * vary(3)[::-1, None, None]
    first = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"])
    last = lambda p, x: jnp.einsum("ebd,dfe->ebf", x, p["w"])
    c = SOLVERS[solver]()
    want = jc.materialize(compressed(first, {"w": w}, c, x))["w"]
    got = jc.materialize(compressed(last, {"w": jnp.moveaxis(w, 0, -1)}, c, x))["w"]
    gap = np.abs(np.moveaxis(np.asarray(got), -1, 0) - want)
    # Sums of another order move what is rounded by less than 1e-5 of a channel's largest entry.
    assert np.all(gap <= 1e-5 * np.abs(np.asarray(want)).max(1, keepdims=True) + 1e-9)


@pytest.mark.ci
def test_a_weight_that_is_summed_over_along_both_axes():
    """Codes are chosen for one of the two products, and both run on them."""
    tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    params = {"w": PARAMS["w"]}
    stats = jc.calibrate(tied, params, [X])
    assert sorted(s.contracting for s in stats["w"]) == [(-2,), (-1,)]
    small = compressed(tied, params, jc.gptq("int3", bounds=MSE), X)
    nearest = compressed(tied, params, jc.quantize("int3", bounds=MSE), X)
    error = lambda small: jnp.linalg.norm(X @ jc.materialize(small)["w"] - X @ params["w"])
    assert error(small) < 0.8 * error(nearest)
    got, want = jc.lift(tied)(small, X), tied(jc.materialize(small), X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_never_met_is_named():
    params = {**PARAMS, "z": normal(5, 16, 8)}
    uses, stats = jc.uses(product, params, X), jc.calibrate(product, params, [X])
    with pytest.raises(NeedsStats, match=r"gptq needs .*moments\(\).* 'z' of shape \(16, 8\)"):
        jc.compress(params, jc.gptq("int3", where=["w", "z"]), uses=uses, stats=stats)


@pytest.mark.ci
@pytest.mark.parametrize("solver", ["gptq", "auto_round"])
def test_one_row_has_none_to_make_up_for_it(solver):
    """Rounding to the nearest is the best of it."""
    fn, params, x = (lambda p, x: x @ p["w"]), {"w": normal(6, 1, 8)}, X[:, :1]
    got = compressed(fn, params, getattr(jc, solver)("int3", bounds=MSE), x)
    want = compressed(fn, params, jc.quantize("int3", bounds=MSE), x)
    np.testing.assert_array_equal(got["w"].materialize(), want["w"].materialize())


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("solver", ["gptq", *LONG])
def test_parameters_keep_their_dtype_and_get_the_codes_of_float32(solver, dtype):
    """Values that bfloat16 holds are the same problem in every dtype."""
    exact = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    params, x = {"w": exact(PARAMS["w"])}, exact(X)
    fn = lambda p, x: x.astype(jnp.float32) @ p["w"].astype(jnp.float32)
    want = jc.materialize(compressed(fn, params, SOLVERS[solver](), x))["w"]
    with jax.enable_x64(dtype == "float64"):
        own = {"w": jnp.asarray(params["w"], dtype)}
        got = jc.materialize(compressed(fn, own, SOLVERS[solver](), x))["w"]
        assert got.dtype == dtype
        gap = np.abs(np.asarray(got, np.float32) - want)
    # A bfloat16 has 8 bits.
    assert gap.max() <= 2.0**-8 * np.abs(want).max()
