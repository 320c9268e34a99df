"""Linear solves whose maps close over parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.sparse.linalg import cg

import jaxopt_compress as jc

KEYS = jax.random.split(jax.random.key(0), 3)
B = jax.random.normal(KEYS[0], (16,))


def ridge(params, b):
    """Solved by conjugate gradients, in a while loop; the map is symmetric."""
    return cg(lambda v: params["w"].T @ (params["w"] @ v) + v, b)[0]


def steps(params, b):
    """Solved by a fixed number of steps, with the residual beside the solution."""
    apply = lambda v: params["w"] @ v

    def solve(apply, b):
        x = jax.lax.fori_loop(0, 60, lambda _, x: x + 0.3 * (b - apply(x)), jnp.zeros_like(b))
        return x, jnp.linalg.norm(apply(x) - b)

    return jax.lax.custom_linear_solve(apply, b, solve, solve, has_aux=True)[0]


CASES = {
    "ridge": (ridge, {"w": jax.random.normal(KEYS[1], (32, 16)) / 6}),
    "steps": (steps, {"w": jax.random.normal(KEYS[2], (16, 16)) / 8 + jnp.eye(16)}),
}


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_solves_run_on_stored_weights_with_derivatives(name):
    """Forward, reverse and forward mode, and mapped over right-hand sides."""
    fn, params = CASES[name]
    small = jc.compress(params, jc.quantize("int8"), uses=jc.uses(fn, params, B))
    dense = jc.materialize(small)
    lifted = jax.jit(jc.lift(fn, on_fallback="error"))
    several = jnp.stack([B, 2 * B])
    for of in (
        lambda f, p: f(p, B),
        lambda f, p: jax.grad(lambda b: jnp.sum(f(p, b) ** 2))(B),
        lambda f, p: jax.jvp(lambda b: f(p, b), (B,), (B,))[1],
        lambda f, p: jax.vmap(f, (None, 0))(p, several),
    ):
        want = of(fn, dense)
        # Both stop at the solver's tolerance of 1e-5, or at its fixed point.
        np.testing.assert_allclose(of(lifted, small), want, atol=2e-5 * float(jnp.abs(want).max()))


def test_uses_and_statistics_are_those_of_the_solver():
    """The map itself and the transposed solver run in derivatives alone."""
    fn, params = CASES["steps"]
    (use,) = jc.uses(fn, params, B)["w"]
    assert (use.contracting, use.count) == ((-1,), 61)
    (stats,) = jc.calibrate(fn, params, [B])["w"]
    met, x = [], np.zeros(16)
    w, b = np.asarray(params["w"], np.float64), np.asarray(B, np.float64)
    for _ in range(60):
        met.append(x)
        x = x + 0.3 * (b - w @ x)
    met.append(x)
    np.testing.assert_allclose(
        np.asarray(stats.second_moment) * np.asarray(stats.rows),
        sum(np.outer(x, x) for x in met),
        rtol=1e-4,
        atol=1e-3,
    )
