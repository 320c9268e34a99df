import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.svd import balanced_factors, rank_for_energy
from tests.models import CASES

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 6)).astype(np.float32)


def truncated(w, rank):
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("scale", [1.0, 1e37, 1e-30])
def test_the_nearest_matrix_of_a_rank(rank, scale):
    w = W * np.float32(scale)
    small = jc.compress({"w": jnp.asarray(w)}, jc.low_rank(rank=rank))["w"]
    # Some roundings of sums of six products.
    error = np.abs(small.materialize() / np.float32(scale) - truncated(w, rank) / scale)
    assert error.max() < 64 * 2.0**-24 * np.abs(W).max()
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(small.u) / scale**0.5, axis=0),
        np.linalg.norm(np.asarray(small.v) / scale**0.5, axis=1),
        rtol=1e-5,
    )


@pytest.mark.parametrize("scale", [1.0, 3e38, 1e-30])
def test_rank_for_energy(scale):
    w = np.clip(W, -1, 1)
    s = np.linalg.svd(w, compute_uv=False) ** 2
    for energy in (0.1, 0.5, 0.9, 1.0):
        want = int(np.sum(np.cumsum(s) < energy * np.sum(s) * (1 - 1e-6))) + 1
        assert int(rank_for_energy(jnp.asarray(w * np.float32(scale)), energy)) == want


def test_a_stack_shares_the_largest_rank():
    one = np.outer(W[:, 0], W[0])
    with pytest.warns(jc.AssumedLayout):
        small = jc.compress({"w": jnp.stack([one, W])}, jc.low_rank(energy=0.9))["w"]
    assert small.rank == int(rank_for_energy(jnp.asarray(W), 0.9)) > 1
    np.testing.assert_allclose(small.materialize()[0], one, atol=1e-5)


def test_half_precision_factors_stay_finite():
    for dtype in (jnp.bfloat16, jnp.float16):
        w = (jnp.clip(W, -1, 1) * (float(jnp.finfo(dtype).max) / 4)).astype(dtype)
        u, v = balanced_factors(w, 6)
        assert u.dtype == v.dtype == dtype
        assert (
            np.isfinite(np.asarray(u, np.float32)).all()
            and np.isfinite(np.asarray(v, np.float32)).all()
        )


def test_a_product_of_rank_one_is_rounded_before_a_sum_that_consumes_it():
    """A compiler may make it a multiplication, and fuse that with the sum into one rounding."""
    w = jnp.asarray(RNG.standard_normal((64, 3)).astype(np.float32))
    small = jc.compress({"w": w}, jc.low_rank(rank=1))["w"]
    fused = jax.jit(lambda small: small.materialize() + 1)(small)
    np.testing.assert_array_equal(fused, small.materialize() + 1)


def test_gradients_go_to_the_factors():
    c = jc.low_rank(rank=2)
    params = {"w": jnp.asarray(W)}
    state = c.init(params)
    g = jnp.asarray(RNG.standard_normal(W.shape).astype(np.float32))

    def view(params, learned):
        return c.apply(params, state._replace(learned=learned))["w"]

    at_params, at_factors = jax.vjp(view, params, state.learned)[1](g)
    assert not np.any(at_params["w"])
    u, v = state.learned["w"]["u"], state.learned["w"]["v"]
    np.testing.assert_allclose(at_factors["w"]["u"], g @ v.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(at_factors["w"]["v"], u.T @ g, rtol=1e-5, atol=1e-5)


def test_factors_follow_the_function():
    case = next(c for c in CASES if c.name == "linen_attention")
    fn, params, args = case.make()
    c = jc.low_rank(rank=4, where="**/kernel")
    small = jc.compress(params, c, uses=jc.uses(fn, params, *args))["params"]
    embed, heads, width = small["query"]["kernel"].shape
    assert small["query"]["kernel"].u.shape == (embed, 1, 4)
    assert small["query"]["kernel"].v.shape == (4, heads, width)
    assert small["out"]["kernel"].u.shape == (heads, width, 4)
    assert small["out"]["kernel"].v.shape == (1, 4, small["out"]["kernel"].shape[-1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jc.low_rank(), ValueError, "either rank or energy"),
        (lambda: jc.low_rank(rank=2, energy=0.5), ValueError, "rank=2 and energy=0.5"),
        (lambda: jc.low_rank(rank=0), ValueError, "rank=0; a rank is at least 1"),
        (lambda: jc.low_rank(energy=1.5), ValueError, r"energy=1.5; .*\(0, 1\]"),
        (
            lambda: jc.low_rank(rank=7).init({"a": {"w": jnp.asarray(W)}}),
            ValueError,
            r"rank=7 is above the limit 6 of 'a/w' of shape \(8, 6\).*at most 6",
        ),
        (
            lambda: jc.low_rank(rank=1).init({"w": jnp.zeros((0, 4))}),
            ValueError,
            r"'w' of shape \(0, 4\) is empty.*exclude it",
        ),
        (
            lambda: jc.low_rank(rank=1, where="b").init({"b": jnp.ones(4)}),
            ValueError,
            r"'b' of shape \(4,\) cannot be read as a matrix.*exclude it",
        ),
        (
            lambda: jax.jit(jc.low_rank(energy=0.5).init)({"w": jnp.asarray(W)}),
            ValueError,
            r"energy=0.5 needs the values of 'w'.*outside of jit, or give rank=",
        ),
        (
            lambda: jc.low_rank(rank=1).init(
                jc.compress({"w": jnp.asarray(W)}, jc.quantize("int8"))
            ),
            TypeError,
            r"'w' of shape \(8, 6\) is a QuantizedArray.*materialize it",
        ),
    ],
)
def test_errors_name_path_shape_and_what_works(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.ci
@pytest.mark.parametrize("stack", [(), (5,)])
def test_contracted_axes_may_lie_between_others(stack):
    """``[heads, d, head_dim]``: one rank for all heads, as of the matrix with ``d`` in front."""
    w = jax.random.normal(jax.random.key(0), (*stack, 3, 6, 4))
    x = jax.random.normal(jax.random.key(1), (*stack, 2, 6))
    fn = lambda p, x: jnp.einsum("...bd,...hdk->...bhk", x, p["w"])
    uses = jc.uses(fn, {"w": w}, x)
    small = jc.compress({"w": w}, jc.low_rank(rank=2), uses=uses)
    u, s, v = np.linalg.svd(
        np.moveaxis(np.asarray(w), -2, -3).reshape(*stack, 6, 12), full_matrices=False
    )
    best = np.einsum("...kr,...r,...rn->...kn", u[..., :2], s[..., :2], v[..., :2, :])
    best = np.moveaxis(best.reshape(*stack, 6, 3, 4), -3, -2)
    np.testing.assert_allclose(jc.materialize(small)["w"], best, atol=2e-5)
    got = jax.jit(jc.lift(fn, on_fallback="error"))(small, x)
    np.testing.assert_allclose(got, fn(jc.materialize(small), x), rtol=1e-4, atol=1e-5)
    assert small["w"].nbytes == 4 * 2 * (6 + 12) * (5 if stack else 1)
