"""Optimizer states in few bits, for any optax optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.groups import spread_to
from jaxopt_compress.numerics.minifloats import Minifloat
from jaxopt_compress.numerics.noise import noise_of
from jaxopt_compress.quantization.rule import measured, rule_of
from jaxopt_compress.quantization.state import QuantizedState
from jaxopt_compress.tree import Where, map_named, named_leaves
from jaxopt_compress.tree.paths import fit_of, is_float
from jaxopt_compress.typing import Leaf, PyTree

# How optax names what it keeps per parameter: sums of squares, and others.
_SECOND = frozenset({"nu", "nu_max", "sum_of_squares", "v", "v_row", "v_col"})
_OTHERS = frozenset({"mu", "trace", "m", "ema", "acc_grads"})


class SmallStates(NamedTuple):
    """The state of `small_states`.

    Attributes:
        count: int32: updates so far, which the noise depends on.
        inner: The state of the inner optimizer, with `QuantizedArray` leaves.
    """

    count: jax.Array
    inner: Any


def small_states(
    inner: optax.GradientTransformation,
    format: str | Format = "float8_e4m3fn",
    *,
    block: int = 128,
    where: Where = None,
    min_size: int = 4096,
    second_moments: Where = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the state of an optimizer in 8 or 4 bits between steps.

    A moving average changes by less than the distance of two levels in a step, so that rounding to
    the nearest level would hold it still: rounding is stochastic, which keeps the expected value.
    Second moments :math:`v` divide the update. They are kept as :math:`\sqrt v`, which halves the
    range that a format has to cover, and no positive one is rounded to zero: one that is too small
    takes the least level, which makes a step smaller and never larger. Integers, whose levels are
    evenly spaced, have diverged for second moments, and are refused.

    Args:
        inner: Any optax optimizer.
        format: A number format: float8_e4m3fn, or float4_e2m1fn for 4 bits; for first moments also
            integers and nf4.
        block: Consecutive entries, along the longest axis, that share a float32 scale.
        where: Which leaves of the state, by their path in it, such as ``"**/mu/**"``, or a
            predicate ``(path, leaf) -> bool``; by default all floating ones of ``min_size`` entries
            and more. Leave out embeddings, whose rows are seldom updated:
            ``lambda path, leaf: "embed" not in path``.
        min_size: Entries below which a leaf stays as it is.
        second_moments: Which of them are second moments, by path; by default those that optax names
            ``nu``, ``nu_max``, ``sum_of_squares``, ``v``.

    Returns:
        An optax transformation; extra arguments go to ``inner``.

    Raises:
        ValueError: In ``init``: a format without a grid for second moments, or nothing is chosen.

    Example:
        >>> import jax.numpy as jnp, optax, jaxopt_compress as jc
        >>> params = {"w": jnp.zeros((512, 512))}
        >>> plain, small = (
        ...     tx.init(params) for tx in (optax.adam(1e-3), jc.small_states(optax.adam(1e-3)))
        ... )
        >>> jc.nbytes(plain), jc.nbytes(small)
        (2097156, 540680)

    References:
        Dettmers et al., 2022, 8-bit Optimizers via Block-wise Quantization. Li et al., 2023, Memory
        Efficient Optimizers with 4-bit States.
    """
    fmt = format_of(format)
    inner = optax.with_extra_args_support(inner)
    squares = _is_second_moment if second_moments is None else second_moments
    if block < 1:
        raise ValueError(f"block={block!r}; it is a number of entries")

    def chosen(state: PyTree) -> dict[str, bool]:
        """Path -> whether it is a second moment, of the leaves that are kept in few bits."""
        large = {p: x for p, x in named_leaves(state) if is_float(x) and x.size >= min_size}
        taken = {p: x for p, x in large.items() if where is None or fit_of(where, p, x)}
        return {p: bool(fit_of(squares, p, x)) for p, x in taken.items() if x.ndim}

    def init(params: PyTree) -> SmallStates:
        state = inner.init(params)
        found = chosen(state)
        if not found:
            raise ValueError(
                f"small_states: no leaf of the state has {min_size} entries or more and is chosen "
                f"by where={where!r}; its leaves are {', '.join(p for p, _ in named_leaves(state))}"
            )
        for path, root in found.items():
            if root and not isinstance(fmt.grid, Minifloat):
                raise ValueError(
                    f"small_states: {fmt.name!r} for the second moment {path!r}: evenly spaced or "
                    "few levels have diverged; use 'float8_e4m3fn' or 'float4_e2m1fn', or leave it "
                    "out by where="
                )
        return SmallStates(jnp.zeros((), jnp.int32), store(state, jnp.zeros((), jnp.int32)))

    def store(state: PyTree, count: jax.Array) -> PyTree:
        found = chosen(state)

        def one(path: str, x: Leaf) -> Leaf:
            return _stored(x, fmt, block, count, found[path]) if path in found else x

        return map_named(one, state)

    def restore(state: PyTree) -> PyTree:
        def one(path: str, x: Leaf) -> Leaf:
            if not isinstance(x, QuantizedArray):
                return x
            value = x.materialize()
            return value * jnp.abs(value) if fit_of(squares, path, value) else value

        return map_named(one, state)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> PyTree:
        updates, new = inner.update(updates, restore(state.inner), params, **extra)
        count = jnp.where(state.count < 2**31 - 1, state.count + 1, state.count)
        return updates, SmallStates(count, store(new, count))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_second_moment(path: str, leaf: Leaf) -> bool:
    """By the first name in a path that optax uses; parameters may have the same names behind it."""
    del leaf
    names = (name for name in path.split("/") if name in _SECOND or name in _OTHERS)
    return next(names, "") in _SECOND


def _stored(x: jax.Array, fmt: Format, block: int, count: jax.Array, root: bool) -> QuantizedArray:
    """An array in blocks along its longest axis, rounded stochastically."""
    # With its sign, so that no choice of second moments loses a value.
    values = jnp.sign(x) * jnp.sqrt(jnp.abs(x)) if root else x
    values = values.astype(jnp.float32)
    axis = max(range(-x.ndim, 0), key=lambda d: (x.shape[d], d))
    stack = tuple(d for d in range(-x.ndim, 0) if d != axis)
    grid = QuantizedState(fmt, (), stack, axis, block)
    grid = measured(grid, values, rule_of(fmt, (block, None), None, True, None))
    scale = spread_to(steps_of(grid.scale), ((axis, block),), x.shape)
    levels, _ = round_to_grid(values, scale, None, fmt, noise_of(values, count))
    if root and isinstance(fmt.grid, Minifloat):
        levels = jnp.where(levels == 0, jnp.sign(values) * fmt.grid.least, levels)
    return QuantizedArray(
        encode(levels, fmt), grid.scale, None, np.dtype(x.dtype), fmt.name, axis, block
    )
