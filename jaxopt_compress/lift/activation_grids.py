"""Activations on a grid: their steps, their levels, and derivatives through the rounding."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import FakeQuantizedArray, InputQuantizedArray
from jaxopt_compress.kernels import differentiated_as
from jaxopt_compress.lift.products import dense_operand
from jaxopt_compress.numerics.codes import round_to_grid
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.learned import slopes
from jaxopt_compress.numerics.rounding import widen
from jaxopt_compress.numerics.steps import symmetric_step
from jaxopt_compress.typing import PyTree


def input_step(w: InputQuantizedArray, x: jax.Array, axes: Sequence[int], spread: Any) -> jax.Array:
    """Float32 steps that broadcast against an activation.

    Args:
        w: The weight that it meets.
        x: The activation.
        axes: The axes of ``x`` that share a step where it is found at run time.
        spread: Brings steps of the weight's rank to that of ``x``.
    """
    if w.scale is not None:
        return spread(w.scale)
    high = lax.stop_gradient(jnp.max(jnp.abs(x), tuple(axes), keepdims=True, initial=0))
    return symmetric_step(high.astype(jnp.float32), w.fmt)


def input_levels(w: InputQuantizedArray, x: jax.Array, step: jax.Array, spread: Any) -> jax.Array:
    """The float32 levels of an activation."""
    x = widen(x)
    x = x if w.offset is None else x - spread(w.offset)
    return round_to_grid(x, step, None, w.fmt)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _on_grid(x: jax.Array, step: jax.Array, fmt: Format, clipping: bool) -> jax.Array:
    """Float32; derivatives are those of `slopes`."""
    del clipping
    return round_to_grid(x, step, None, fmt)[0] * step


@_on_grid.defjvp
def _on_grid_jvp(fmt, clipping, primals, tangents):
    x, step = primals
    inside, slope = slopes(x, step, fmt, clipping)
    change = jnp.where(inside, tangents[0], 0) + slope * tangents[1]
    return _on_grid(x, step, fmt, clipping), change


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _within_its_range(x: jax.Array, step: jax.Array, fmt: Format) -> jax.Array:
    """As `_on_grid`, by a step made for ``x``: values are beyond the range by rounding alone."""
    return _on_grid(x, step, fmt, False)


@_within_its_range.defjvp
def _within_its_range_jvp(fmt, primals, tangents):
    return _within_its_range(*primals, fmt), tangents[0]


def rounded_input(w: InputQuantizedArray, x: jax.Array, step: jax.Array, spread: Any) -> jax.Array:
    r"""An activation on its grid, differentiable with respect to it, its step and its offset.

    .. math:: \hat{x} = \mathrm{round}(\mathrm{clip}((x - \beta) / s)) \, s + \beta

    References:
        Esser et al., 2020, Learned Step Size Quantization. Bhalgat et al., 2020, LSQ+: Improving
        Low-Bit Quantization Through Learnable Offsets and Better Initialization.
    """
    wide, fmt = widen(x), w.fmt
    if w.scale is None:
        return _within_its_range(wide, step, fmt).astype(x.dtype)
    if w.offset is None:
        return _on_grid(wide, step, fmt, w.clipping).astype(x.dtype)
    offset = spread(w.offset)
    return (_on_grid(wide - offset, step, fmt, w.clipping) + offset).astype(x.dtype)


def residuals(
    w: InputQuantizedArray, x: jax.Array, step: Callable[[], jax.Array], spread: Any
) -> tuple[jax.Array, jax.Array]:
    """The factors that derivatives of a product are taken at, both differentiable."""
    if w.residuals == "unrounded":
        values = w.weight.form.codes if isinstance(w.weight, FakeQuantizedArray) else w.weight
        return x, dense_operand(values, x.dtype)
    rounded = x if w.format is None else rounded_input(w, x, step(), spread)
    return rounded, dense_operand(w.weight, x.dtype)


def straight_through(
    run: Callable[..., jax.Array], smooth: Callable[..., jax.Array], *args: PyTree
) -> jax.Array:
    """``run(*args)``, of trees, with the derivatives of ``smooth``."""
    leaves, treedef = jax.tree.flatten(args)
    flat = lambda fn: lambda *leaves: fn(*jax.tree.unflatten(treedef, leaves))
    return differentiated_as(flat(smooth), flat(run))(*leaves)
