"""Optimizer states in few bits, for any optax optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_compress.arrays import QuantizedArray, is_compressed
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.groups import spread_to
from jaxopt_compress.numerics.minifloats import Minifloat
from jaxopt_compress.numerics.noise import noise_of
from jaxopt_compress.quantization.rule import measured, rule_of
from jaxopt_compress.quantization.state import QuantizedState
from jaxopt_compress.tree import Where, map_named, named_leaves
from jaxopt_compress.tree.paths import fit_of, is_float, paths_of
from jaxopt_compress.typing import Leaf, PyTree

# Fields of the states of optax: averages of squares, and of gradients and updates. Others, such as
# the point where training began, or an average of parameters, are no moments.
_SECOND = frozenset(
    {"nu", "nu_max", "sum_of_squares", "v", "v_row", "v_col", "exp_avg_sq", "n", "e_g", "e_x"}
)
_FIRST = frozenset({"mu", "trace", "m", "ema", "acc_grads", "exp_avg"})


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
            predicate ``(path, leaf) -> bool``; by default the moments that optax keeps, of
            ``min_size`` entries and more. Leave out embeddings, whose rows are seldom updated:
            ``lambda path, leaf: "embed" not in path``.
        min_size: Entries below which a leaf stays as it is.
        second_moments: Which of them are second moments, by path; by default the fields that optax
            names ``nu``, ``nu_max``, ``sum_of_squares``, ``v``, ``exp_avg_sq`` and alike.

    Returns:
        An optax transformation; extra arguments go to ``inner``.

    Raises:
        ValueError: In ``init``: a format without a grid for second moments, nothing is chosen, or
            a variance is, which optax computes as a difference of two moments.

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
    if block < 1:
        raise ValueError(f"block={block!r}; it is a number of entries")
    kept = _Kept(format_of(format), block, where, min_size, second_moments)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> SmallStates:
        state, count = inner.init(params), jnp.zeros((), jnp.int32)
        _check(state, kept)
        return SmallStates(count, _store(state, kept, count))

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[Any, SmallStates]:
        wide = _restore(state.inner, kept)
        updates, new = inner.update(updates, wide, params, **extra_args)
        count = jnp.where(state.count < 2**31 - 1, state.count + 1, state.count)
        return updates, SmallStates(count, _store(new, kept, count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Kept(NamedTuple):
    """Which leaves of a state are kept in few bits, and how: the arguments of `small_states`."""

    fmt: Format
    block: int
    where: Where
    min_size: int
    second_moments: Where

    def is_square(self, path: str, x: Leaf, field: str) -> bool:
        """Whether a leaf is a second moment."""
        if self.second_moments is None:
            return field in _SECOND
        return bool(fit_of(self.second_moments, path, x))

    def chosen(self, state: PyTree) -> dict[str, bool]:
        """Path -> whether it is a second moment, of the leaves that are kept in few bits."""
        fields, found = _fields(state), {}
        for path, x in named_leaves(state):
            known = fields[path] in _SECOND | _FIRST
            taken = known if self.where is None else fit_of(self.where, path, x)
            if taken and is_float(x) and x.size >= self.min_size and x.ndim:
                found[path] = self.is_square(path, x, fields[path])
        return found


def _check(state: PyTree, kept: _Kept) -> None:
    """Refuses a choice of nothing, of variances, and formats that diverge for second moments."""
    found = kept.chosen(state)
    if not found:
        raise ValueError(
            f"small_states: no leaf of the state has {kept.min_size} entries or more and is chosen "
            f"by where={kept.where!r}; its leaves are "
            f"{', '.join(path for path, _ in named_leaves(state))}"
        )
    if _rounds_a_variance(state, found):
        raise ValueError(
            "small_states: centered RMSProp divides by the root of nu - mu^2, which rounding "
            "can make negative: take centered=False, or leave mu and nu out by where="
        )
    squares = [path for path, root in found.items() if root]
    if squares and not isinstance(kept.fmt.grid, Minifloat):
        raise ValueError(
            f"small_states: {kept.fmt.name!r} for the second moment {squares[0]!r}: evenly spaced "
            "or few levels have diverged; use 'float8_e4m3fn' or 'float4_e2m1fn', or leave it out "
            "by where="
        )


def _store(state: PyTree, kept: _Kept, count: jax.Array) -> PyTree:
    """The state of the inner optimizer with its chosen leaves in few bits."""
    found = kept.chosen(state)

    def stored(path: str, x: Leaf) -> Leaf:
        return _stored(x, kept.fmt, kept.block, count, found[path]) if path in found else x

    return map_named(stored, state)


def _restore(state: PyTree, kept: _Kept) -> PyTree:
    """The state of the inner optimizer as it computes with it."""
    fields = _fields(state)

    def restored(path: str, x: Leaf) -> Leaf:
        if not isinstance(x, QuantizedArray):
            return x
        value = x.materialize()
        return value * jnp.abs(value) if kept.is_square(path, value, fields[path]) else value

    return map_named(restored, state)


def _fields(state: PyTree) -> dict[str, str]:
    """Path -> the first field of optax's states on it that is a moment, or an empty string.

    Labels of `optax.multi_transform` are keys, not fields; parameters come behind.
    """
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_compressed)
    named = lambda keys: [k.name for k in keys if isinstance(k, jax.tree_util.GetAttrKey)]
    first = lambda keys: next((n for n in named(keys) if n in _SECOND | _FIRST), "")
    keyed = [keys for keys, _ in flat]
    return dict(zip(paths_of(keyed), map(first, keyed), strict=True))


def _rounds_a_variance(state: PyTree, found: dict[str, bool]) -> bool:
    """Whether moments are chosen whose difference is a variance."""
    centered = lambda x: isinstance(x, optax.ScaleByRStdDevState)
    marked = jax.tree.map(
        lambda x: jax.tree.map(lambda _: True, x) if centered(x) else False, state, is_leaf=centered
    )
    return any(inside and path in found for path, inside in named_leaves(marked))


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
