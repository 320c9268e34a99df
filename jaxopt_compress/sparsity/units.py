"""What is kept or pruned as one, and what is compared with what."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.compression import Parameter

SCOPES = ("leaf", "output", "global")


class Pattern(NamedTuple):
    """Which entries are kept or pruned together.

    Attributes:
        kind: ``"entries"``, ``"n:m"``, ``"block"``, ``"channels"`` or ``"inputs"``.
        sizes: ``(n, m)``, or the lengths of a block along the contracted and the output axes.
        transposable: Whether n:m holds along the output axes too.
    """

    kind: str = "entries"
    sizes: tuple[int, int] = (1, 1)
    transposable: bool = False

    @property
    def n_m(self) -> tuple[int, int] | None:
        """``(n, m)``, or None."""
        return self.sizes if self.kind == "n:m" else None


def read_pattern(pattern: str | None) -> Pattern:
    """Reads the argument of `prune`.

    Raises:
        ValueError: It cannot be read.
    """
    if pattern in (None, "unstructured"):
        return Pattern()
    if pattern in ("channels", "inputs"):
        return Pattern(pattern)
    if match := re.fullmatch(r"(\d+):(\d+)(t?)", pattern):
        sizes = int(match[1]), int(match[2])
        if 0 < sizes[0] < sizes[1]:
            return Pattern("n:m", sizes, bool(match[3]))
    if match := re.fullmatch(r"block:(\d+)x(\d+)", pattern):
        sizes = int(match[1]), int(match[2])
        if min(sizes) > 0:
            return Pattern("block", sizes)
    raise ValueError(
        f"pattern={pattern!r}; it is 'unstructured', 'n:m' with 0 < n < m, such as '2:4', "
        "'2:4t', 'block:16x16', 'channels' or 'inputs'"
    )


class Units(NamedTuple):
    """One parameter as what is kept or pruned as one.

    Attributes:
        gather: Entries to ``[*pools, *units]``, the mean over each unit; units are compared within
            a pool.
        spread: Booleans ``[*pools, *units]`` to those of entries.
        pools: How many leading axes tell pools apart.
    """

    gather: Callable[[jax.Array], jax.Array]
    spread: Callable[[jax.Array], jax.Array]
    pools: int


def units_of(parameter: Parameter, pattern: Pattern, scope: str, stack: int) -> Units:
    """How a parameter is compared.

    Args:
        parameter: A parameter of any layout.
        pattern: Any but n:m.
        scope: One of `SCOPES`.
        stack: How many leading axes are apart from each other in the scope ``"global"``.
    """
    layout, rank = parameter.layout, len(parameter.value.shape)
    apart = sorted(layout.stack) if scope != "global" else list(range(-rank, stack - rank))
    if pattern.kind == "block":
        return _blocks(parameter, pattern.sizes, len(apart))
    apart += sorted(layout.output) if scope == "output" else []
    order = [*apart, *(d for d in range(-rank, 0) if d not in apart)]
    inverse = [d - rank for d in np.argsort([d + rank for d in order])]
    # Outside of jit a transpose is a copy, even if it moves nothing.
    turned = order != list(range(-rank, 0))
    merged = {
        "entries": (),
        "channels": layout.contracting,
        "inputs": [d for d in range(-rank, 0) if d not in (*layout.stack, layout.group_axis)],
    }[pattern.kind]

    def gather(x: jax.Array) -> jax.Array:
        x = mean(x, tuple(merged)) if merged else x
        return x.transpose(order) if turned else x

    def spread(mask: jax.Array) -> jax.Array:
        mask = mask.transpose(inverse) if turned else mask
        return jnp.broadcast_to(mask, parameter.value.shape) if merged else mask

    return Units(gather, spread, len(apart))


def mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over axes, which stay with length 1, in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = max(math.prod(x.shape[d] for d in axes), 1)
    return jnp.sum(wide, axes, keepdims=True) / count


def _blocks(parameter: Parameter, sizes: tuple[int, int], pools: int) -> Units:
    """Blocks of the matrix form; those at the ends may be smaller."""
    k, n = jax.eval_shape(parameter.matrix).shape[-2:]
    a, b = (max(min(size, length), 1) for size, length in zip(sizes, (k, n), strict=True))
    pad = (-k % a, -n % b)

    def inside(length: int, size: int) -> np.ndarray:
        return np.minimum(size, length - np.arange(0, length, size)).astype(np.float32)

    entries = inside(k, a)[:, None] * inside(n, b)

    def gather(x: jax.Array) -> jax.Array:
        m = parameter.matrix(x)
        lead = m.shape[:-2]
        m = jnp.pad(m, [(0, 0)] * len(lead) + [(0, pad[0]), (0, pad[1])])
        m = m.astype(jnp.promote_types(m.dtype, jnp.float32))
        blocks = m.reshape(*lead, (k + pad[0]) // a, a, (n + pad[1]) // b, b)
        return jnp.sum(blocks, (-3, -1)) / entries

    def spread(mask: jax.Array) -> jax.Array:
        wide = jnp.repeat(jnp.repeat(mask, a, -2), b, -1)
        return parameter.from_matrix(wide[..., :k, :n])

    return Units(gather, spread, pools)
