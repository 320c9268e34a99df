"""Backward passes on a grid: cotangents are rounded before they meet a weight or an activation.

A product has two derivatives, each a product with the cotangent. The cotangent is rounded for each
of them with a step for all that a row sums over, stochastically, so that gradients keep their
expected value. Where weight and activation are integers with steps that leave the sum, both are
integer products: the other factor's steps go into the cotangent before it is rounded.

References:
    Zhou et al., 2016, DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
    Bitwidth Gradients. Gupta et al., 2015, Deep Learning with Limited Numerical Precision.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import InputQuantizedArray, QuantizedArray
from jaxopt_compress.kernels import transposed_dot, varying_alike
from jaxopt_compress.lift.activation_grids import straight_through
from jaxopt_compress.lift.products import Product, aligned, axis_names
from jaxopt_compress.numerics.codes import round_to_grid
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.noise import noise_of
from jaxopt_compress.numerics.steps import symmetric_step
from jaxopt_compress.typing import PyTree, Value


def differentiated(
    run: Callable[..., jax.Array],
    product: Callable[[jax.Array, jax.Array], jax.Array],
    factors: Callable[..., tuple[jax.Array, jax.Array]],
    through: Callable[..., tuple[jax.Array, jax.Array]],
    w: InputQuantizedArray,
    x: jax.Array,
    *also: PyTree,
) -> jax.Array:
    """``run(w, x, *also)`` with the derivatives that a weight in training asks for.

    Args:
        run: The product on stored codes.
        product: The product of dense factors.
        factors: ``factors(w, x)``: those that derivatives are taken at.
        through: ``through(w, x, g, format)``: their cotangents, from one rounded to a format.
        w: The weight.
        x: The activation.
        *also: Trees of arrays that the stored codes are read from. Derivatives do not see them.
    """
    if w.gradients is None:
        smooth: Callable[..., jax.Array] = lambda w, x, *_: product(*factors(w, x))
        if w.residuals == "rounded":
            # Rounded anew in the backward pass: compilers may keep all copies until then.
            smooth = jax.checkpoint(smooth)
        return straight_through(run, smooth, w, x, *also)
    back = format_of(w.gradients)
    return _with_backward(run, factors, lambda w, x, g: through(w, x, g, back), w, x, *also)


def _with_backward(
    run: Callable[..., jax.Array],
    factors: Callable[..., tuple[jax.Array, jax.Array]],
    through: Callable[..., tuple[jax.Array, jax.Array]],
    w: Value,
    x: jax.Array,
    *also: PyTree,
) -> jax.Array:
    """``run(w, x, *also)`` with a backward pass of its own.

    It has no forward-mode derivative: nothing is rounded in a backward pass there.

    Args:
        run: The product.
        factors: ``factors(w, x)``: the rounded activation and the dense weight, differentiable.
        through: ``through(w, x, g)``: the cotangents of both.
        w: The weight, a tree.
        x: The activation.
        *also: Further trees, without a derivative.
    """

    def backward(args: tuple[Value, jax.Array], g: jax.Array) -> tuple[Value, ...]:
        like, pull = jax.vjp(factors, *args)
        cotangents = through(*args, g)
        own = pull(tuple(c.astype(y.dtype) for c, y in zip(cotangents, like, strict=True)))
        return (*own, *(None for _ in also))

    call = jax.custom_vjp(run)
    call.defvjp(lambda w, x, *also: (run(w, x, *also), (w, x)), backward)
    leaves, treedef = jax.tree.flatten((w, x, *also))
    # The backward pass may mix them, and a cotangent has to vary as what it belongs to.
    return call(*jax.tree.unflatten(treedef, varying_alike(leaves)))


def rounded(g: jax.Array, axes: Sequence[int], fmt: Format) -> tuple[jax.Array, jax.Array]:
    """The float32 levels of a cotangent, and the steps that entries along ``axes`` share."""
    wide = g.astype(jnp.float32)
    high = jnp.max(jnp.abs(wide), tuple(axes), keepdims=True, initial=0)
    # Not half a step above the top level: what is clipped loses its expected value.
    step = symmetric_step(high, fmt._replace(top=fmt.grid.high))
    return round_to_grid(wide, step, None, fmt, noise_of(wide))[0], step


def through_product(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    w: jax.Array,
    g: jax.Array,
    axes: tuple[Sequence[int], Sequence[int]],
    fmt: Format,
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of ``product(x, w)``, from a rounded one.

    Args:
        product: Linear in either argument.
        x: The activation.
        w: The weight.
        g: The cotangent of the result.
        axes: The axes of ``g`` that share a step on the way to ``x``, and to ``w``.
        fmt: The number format that ``g`` is rounded to.
    """
    _, pull = jax.vjp(product, x, w)

    def along(axes: Sequence[int]) -> jax.Array:
        level, step = rounded(g, axes, fmt)
        return (level * step).astype(g.dtype)

    return pull(along(axes[0]))[0], pull(along(axes[1]))[1]


def meets_integers(w: QuantizedArray | None, how: Product, fmt: Format) -> bool:
    """Whether both derivatives of a product with this weight can be integer products."""
    if w is None or w.zero is not None or w.group_size is not None:
        return False
    whole = isinstance(fmt.grid, Integers) and fmt.grid.high <= 127
    return whole and all(w.scale.shape[d] == 1 for d in how.contract[1])


def through_integers(
    w: QuantizedArray,
    codes: jax.Array,
    step: jax.Array,
    g: jax.Array,
    how: Product,
    fmt: Format,
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of the activation and of the dense weight, by integer products.

    Args:
        w: The weight, as integer codes with one step per output.
        codes: The integer codes of the activation.
        step: Its steps, which broadcast against it and are constant along what is summed.
        g: The cotangent of ``[*batch, *free axes of x, *free axes of w]``.
        how: The product.
        fmt: The integer format that ``g`` is rounded to.

    Returns:
        ``(of x, of w)`` in float32.
    """
    wide = g.astype(jnp.float32)
    of_x, of_w, of_y = axis_names(codes.ndim, w.ndim, how)

    def back(other: jax.Array, steps: jax.Array, names: str, to: str) -> jax.Array:
        summed = [i for i, name in enumerate(of_y) if name not in to]
        level, own = rounded(wide * aligned(steps, names, of_y), summed, fmt)
        y = _integer_einsum(level.astype(jnp.int8), of_y, other, names, to)
        return y * aligned(own, of_y, to)

    return back(w.codes, w.scale, of_w, of_x), back(codes, step, of_x, of_w)


def _integer_einsum(a: jax.Array, a_names: str, b: jax.Array, b_names: str, to: str) -> jax.Array:
    """``einsum`` of integer codes, summed in int32, as float32."""
    batch = [name for name in a_names if name in b_names and name in to]
    summed = [name for name in a_names if name in b_names and name not in to]
    rows = [name for name in a_names if name not in b_names]
    columns = [name for name in b_names if name not in a_names]

    def matrix(x: jax.Array, names: str, *parts: list[str]) -> jax.Array:
        x = jnp.transpose(x, [names.index(name) for part in (batch, *parts) for name in part])
        lead = x.shape[: len(batch)]
        split = len(batch) + len(parts[0])
        return x.reshape(*lead, math.prod(x.shape[len(batch) : split]), math.prod(x.shape[split:]))

    left, last = matrix(a, a_names, rows, summed), b_names[-1] in summed
    right = matrix(b, b_names, *((columns, summed) if last else (summed, columns)))
    y = transposed_dot(left, right, last=last)
    size = dict(zip(a_names + b_names, a.shape + b.shape, strict=True))
    order = [*batch, *rows, *columns]
    y = y.reshape([size[name] for name in order])
    return jnp.transpose(y, [order.index(name) for name in to])
