"""Rounding to a grid with straight-through derivatives."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.codes import decode, round_to_grid
from jaxopt_compress.numerics.formats import Format


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def fake_quantize(
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    noise: jax.Array | None,
    fmt: Format,
    clips: bool = True,
) -> jax.Array:
    """Rounds to a grid and back; the identity for derivatives.

    Args:
        w: Floats, any shape.
        scale: Float32 steps that broadcast against ``w``; constants for derivatives.
        zero: Integer zero points likewise, or None.
        noise: For stochastic rounding: uniform in [0, 1), of the shape of ``w``; or None.
        fmt: The number format.
        clips: Whether derivatives are 0 where an entry was clipped.

    Returns:
        Floats of the shape and dtype of ``w``.
    """
    del clips
    levels, _ = round_to_grid(w, scale, zero, fmt, noise)
    if zero is not None:
        levels = levels - zero.astype(jnp.float32)
    # Codes have one zero, so the view of a small negative entry is 0.0, not -0.0.
    return decode(jnp.where(levels == 0, 0, levels), scale, w.dtype)


@fake_quantize.defjvp
def _fake_quantize_jvp(fmt, clips, primals, tangents):
    view, tangent = fake_quantize(*primals, fmt, clips), tangents[0]
    if clips:
        w, scale, zero, noise = primals
        _, inside = round_to_grid(w, scale, zero, fmt, noise)
        tangent = jnp.where(inside, tangent, 0)
    return view, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def rounded_later(w: jax.Array, scale: jax.Array, zero: jax.Array | None, fmt: Format) -> jax.Array:
    """``w`` itself, with the derivatives of its rounding to a grid that clips."""
    del scale, zero, fmt
    return w


@rounded_later.defjvp
def _rounded_later_jvp(fmt, primals, tangents):
    w, scale, zero = primals
    _, inside = round_to_grid(w, scale, zero, fmt)
    return w, jnp.where(inside, tangents[0], 0)
