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
    fmt = format_of(format)
    inner = optax.with_extra_args_support(inner)
    if block < 1:
        raise ValueError(f"block={block!r}; it is a number of entries")

    def chosen(state: PyTree) -> dict[str, bool]:
        """Path -> whether it is a second moment, of the leaves that are kept in few bits."""
        fields, found = _fields(state), {}
        for path, x in named_leaves(state):
            known = fields[path] in _SECOND | _FIRST
            taken = known if where is None else fit_of(where, path, x)
            if taken and is_float(x) and x.size >= min_size and x.ndim:
                found[path] = is_square(path, x, fields[path])
        return found

    def is_square(path: str, x: Leaf, field: str) -> bool:
        if second_moments is None:
            return field in _SECOND
        return bool(fit_of(second_moments, path, x))

    def init(params: PyTree) -> SmallStates:
        state = inner.init(params)
        found = chosen(state)
        if not found:
            raise ValueError(
                f"small_states: no leaf of the state has {min_size} entries or more and is chosen "
                f"by where={where!r}; its leaves are {', '.join(p for p, _ in named_leaves(state))}"
            )
        if _rounds_a_variance(state, found):
            raise ValueError(
                "small_states: centered RMSProp divides by the root of nu - mu^2, which rounding "
                "can make negative: take centered=False, or leave mu and nu out by where="
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
        fields = _fields(state)

        def one(path: str, x: Leaf) -> Leaf:
            if not isinstance(x, QuantizedArray):
                return x
            value = x.materialize()
            return value * jnp.abs(value) if is_square(path, value, fields[path]) else value

        return map_named(one, state)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> PyTree:
        updates, new = inner.update(updates, restore(state.inner), params, **extra)
        count = jnp.where(state.count < 2**31 - 1, state.count + 1, state.count)
        return updates, SmallStates(count, store(new, count))

    return optax.GradientTransformationExtraArgs(init, update)


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
