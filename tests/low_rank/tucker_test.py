"""Kernels in three parts: the decomposition by NumPy, and convolutions that run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.cp import cp3
from jaxopt_compress.numerics.tucker import tucker2

RNG = np.random.default_rng(0)


def conv(p, x, strides=(1, 1), numbers=("NHWC", "HWIO", "NHWC")):
    return jax.lax.conv_general_dilated(x, p["w"], strides, "SAME", dimension_numbers=numbers)


def kernel(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_a_kernel_of_those_ranks_is_found():
    w = np.einsum("sab,ia,bo->sio", *(RNG.standard_normal(n) for n in ((9, 2, 3), (6, 2), (3, 8))))
    a, g, b = tucker2(jnp.asarray(w, jnp.float32), 2, 3)
    np.testing.assert_allclose(np.einsum("sab,ia,bo->sio", g, a, b), w, atol=1e-4)
    np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)


def test_rounds_lose_no_more_than_singular_vectors_alone():
    w = RNG.standard_normal((9, 6, 8))

    def project(x, axis, rank):
        flat = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
        u = np.linalg.svd(flat, full_matrices=False)[0][:, :rank]
        return np.moveaxis(np.tensordot(u @ u.T, x, (1, axis)), 0, axis)

    truncated = project(w, 1, 3)
    lost = lambda x: np.linalg.norm(w - x)
    hosvd = lost(project(truncated, 2, 4))
    a, g, b = tucker2(jnp.asarray(w, jnp.float32), 3, 4)
    assert lost(np.einsum("sab,ia,bo->sio", g, a, b)) <= hosvd * (1 + 1e-6)


@pytest.mark.ci
@pytest.mark.fast("HWIO-1")
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("lies", ["HWIO", "OIHW"])
def test_a_convolution_runs_three_smaller_ones(lies, strides):
    channels = ("NHWC", "NHWC") if lies == "HWIO" else ("NCHW", "NCHW")
    numbers = (channels[0], lies, channels[1])
    shape = (3, 3, 8, 12) if lies == "HWIO" else (12, 8, 3, 3)
    x = kernel(2, 7, 7, 8) if lies == "HWIO" else kernel(2, 8, 7, 7)
    fn = lambda p, x: conv(p, x, (strides, strides), numbers)
    params = {"w": kernel(*shape)}
    c, uses = jc.tucker(ranks=(3, 4)), jc.uses(fn, params, x)
    state = c.init(params, uses=uses)
    small = c.compress(params, state)
    np.testing.assert_array_equal(jax.jit(c.apply)(params, state)["w"], jc.materialize(small)["w"])
    assert (small["w"].shape, small["w"].ranks) == (shape, (3, 4))
    got = jax.jit(jc.lift(fn, on_fallback="error"))(small, x)
    np.testing.assert_allclose(got, fn(jc.materialize(small), x), atol=1e-4)
    quantized = jc.compress(small, jc.quantize("int8"), uses=uses)
    assert quantized["w"].describe() == "tucker 3x4 of int8"
    got = jax.jit(jc.lift(fn, on_fallback="error"))(quantized, x)
    np.testing.assert_allclose(got, fn(jc.materialize(quantized), x), atol=1e-4)


@pytest.mark.ci
def test_ranks_by_bytes_and_energy():
    params = {"w": kernel(3, 3, 16, 24)}
    small = jc.compress(params, jc.tucker(ratio=4.0), layout="in,out")
    assert 0.2 < jc.nbytes(small) / jc.nbytes(params) <= 0.25
    full = jc.compress(params, jc.tucker(energy=1.0), layout="in,out")["w"]
    np.testing.assert_allclose(full.materialize(), params["w"], atol=1e-4)
    small = jc.compress(params, jc.tucker(energy=0.8), layout="in,out")["w"]
    for axis, rank in zip((2, 3), small.ranks, strict=True):
        flat = np.moveaxis(np.asarray(params["w"]), axis, 0).reshape(params["w"].shape[axis], -1)
        share = np.cumsum(np.linalg.svd(flat, compute_uv=False) ** 2)
        share = share / share[-1]
        assert share[rank - 2] < 0.8 <= share[rank - 1]


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**70])
def test_scales_change_nothing_else(scale):
    """Squares of these leave float32."""
    w = kernel(3, 3, 6, 8)
    for c in (jc.tucker(ranks=(3, 4)), jc.tucker(energy=0.7)):
        want, got = (jc.compress({"w": x}, c, layout="in,out")["w"] for x in (w, w * scale))
        assert got.ranks == want.ranks
        np.testing.assert_array_equal(got.materialize() / scale, want.materialize())


def test_a_core_beyond_float16_is_shared_by_the_other_parts():
    w = jnp.full((3, 3, 64, 64), 5e3, jnp.float16)
    small = jc.compress({"w": w}, jc.tucker(ranks=(2, 2)), layout="in,out")["w"]
    np.testing.assert_allclose(small.materialize(), w, rtol=2e-3)


@pytest.mark.ci
def test_products_of_vectors_are_found():
    """A sum of four, of which the decomposition is unique (Kruskal, 1977)."""
    parts = [RNG.standard_normal(n) for n in ((9, 4), (6, 4), (8, 4))]
    w = np.einsum("sr,ir,or->sio", *parts)
    a, c, b = cp3(jnp.asarray(w, jnp.float32), 4)
    np.testing.assert_allclose(np.einsum("ir,sr,ro->sio", a, c, b), w, atol=1e-3)
    # Each found vector is one of those that were put in, up to its length.
    unit = lambda x: np.asarray(x) / np.linalg.norm(x, axis=0)
    alike = np.abs(unit(parts[1]).T @ unit(a))
    np.testing.assert_allclose(alike.max(0), 1, atol=1e-3)
    lost = [
        np.linalg.norm(np.einsum("ir,sr,ro->sio", *cp3(jnp.asarray(w), 3, rounds)) - w)
        for rounds in (1, 20)
    ]
    assert lost[1] < lost[0]


@pytest.mark.ci
@pytest.mark.parametrize("lies", ["HWIO", "OIHW"])
def test_a_convolution_runs_a_depthwise_one_between_two_small_ones(lies):
    channels = "NHWC" if lies == "HWIO" else "NCHW"
    shape = (3, 3, 8, 12) if lies == "HWIO" else (12, 8, 3, 3)
    x = kernel(2, 7, 7, 8) if lies == "HWIO" else kernel(2, 8, 7, 7)
    fn = lambda p, x: conv(p, x, (2, 1), (channels, lies, channels))
    params = {"w": kernel(*shape)}
    uses = jc.uses(fn, params, x)
    small = jc.compress(params, jc.cp(rank=10, rounds=3), uses=uses)
    assert (small["w"].shape, small["w"].describe()) == (shape, "cp 10")
    for own in (small, jc.compress(small, jc.quantize("int8"), uses=uses)):
        got = jax.jit(jc.lift(fn, on_fallback="error"))(own, x)
        np.testing.assert_allclose(got, fn(jc.materialize(own), x), atol=1e-4)
    ratio = jc.compress(params, jc.cp(ratio=4.0, rounds=1), uses=uses)
    assert jc.nbytes(params) / 4 - 4 * 29 < jc.nbytes(ratio) <= jc.nbytes(params) / 4


def test_input_channels_on_either_side_are_asked_for():
    """Of kernels ``IOHW``, output channels lie between input channels and the window."""
    fn = lambda p, x: conv(p, x, numbers=("NHWC", "IOHW", "NHWC"))
    params, x = {"w": kernel(8, 12, 3, 3)}, kernel(1, 5, 5, 8)
    uses = jc.uses(fn, params, x)
    with pytest.raises(ValueError, match=r"either of .* say inputs=-4 or inputs=-2"):
        jc.tucker(ranks=(3, 4)).init(params, uses=uses)
    small = jc.compress(params, jc.tucker(ranks=(3, 4), inputs=-4), uses=uses)
    assert small["w"].first.shape == (8, 3, 1, 1)
    got = jax.jit(jc.lift(fn, on_fallback="error"))(small, x)
    np.testing.assert_allclose(got, fn(jc.materialize(small), x), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jc.tucker(), "give one of ranks, energy and ratio"),
        (lambda: jc.tucker(ranks=(0, 2)), r"ranks=\(0, 2\); they are two"),
        (
            lambda: jc.compress({"w": jnp.ones((4, 3))}, jc.tucker((2, 2)), layout="in,out"),
            r"'w' of shape \(4, 3\) is no kernel of a convolution.*exclude it",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape, true, asked", [((9, 4, 6), 1, 4), ((4, 12, 10), 2, 8)])
def test_more_products_than_a_kernel_has_are_no_nan(shape, true, asked):
    parts = [RNG.standard_normal((n, true)) for n in shape]
    w = np.einsum("sr,ir,or->sio", *parts)
    a, c, b = cp3(jnp.asarray(w, jnp.float32), asked, 30)
    found = np.einsum("ir,sr,ro->sio", a, c, b)
    assert np.linalg.norm(found - w) < 1e-2 * np.linalg.norm(w)
