"""How a sparsity is spread over parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Size(NamedTuple):
    """The size of one parameter.

    Attributes:
        shape: Its shape, without stack axes.
        count: How many entries its stack has; 1 without a stack.
        flops: The operations of its products in a call, of all entries of its stack; None where
            they are not known.
    """

    shape: tuple[int, ...]
    count: int = 1
    flops: int | None = None

    @property
    def size(self) -> int:
        """How many entries there are in all."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.count


Distribution = Callable[[Mapping[str, Size], Any], dict[str, Any]]


def erk(kernels: bool = True, of: str = "entries") -> Distribution:
    r"""Spreads a sparsity so that layers with few entries keep more of them (Erdős-Rényi).

    .. math:: 1 - s_l = \min\left(1, \; \epsilon \, \frac{\sum_i n_i}{\prod_i n_i}\right)

    over the lengths :math:`n_i` of the axes of parameter :math:`l`, with the :math:`\epsilon` for
    which all parameters together have the sparsity that the schedule asks for. Axes of a stack do
    not count as axes.

    Args:
        kernels: Whether the axes of windows of convolutions count too, which is the "kernel" of
            the name; without, only the last two axes do.
        of: Whether the sparsity of the schedule is the share of ``"entries"`` that are pruned, or
            that of the ``"flops"`` of their products, which takes ``uses``. An entry of a
            convolution's kernel is in as many products as there are places of the window.

    Returns:
        A function ``({path: Size}, sparsity) -> {path: sparsity}`` for ``prune(distribution=)``,
        jit-able in the sparsity. Any such function is a distribution.

    Raises:
        ValueError: ``of`` is neither; or, when it is used, operations are not known.

    Example:
        >>> import jaxopt_compress as jc
        >>> from jaxopt_compress.sparsity.distributions import Size
        >>> sizes = {"a": Size((2, 4)), "b": Size((3, 6)), "c": Size((2, 4, 6))}
        >>> {k: round(float(s), 3) for k, s in jc.distributions.erk()(sizes, 0.5).items()}
        {'a': 0.0, 'b': 0.31, 'c': 0.655}
        >>> sizes = {"conv": Size((3, 3, 8, 8), flops=90_000), "head": Size((64, 10), flops=1_000)}
        >>> spread = jc.distributions.erk(of="flops")
        >>> {k: round(float(s), 3) for k, s in sorted(spread(sizes, 0.5).items())}
        {'conv': 0.506, 'head': 0.0}

    References:
        Mocanu et al., 2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse
        Connectivity inspired by Network Science. Evci et al., 2020, Rigging the Lottery.
    """
    if of not in ("entries", "flops"):
        raise ValueError(f"erk(of={of!r}); there are 'entries' and 'flops'")

    def spread(sizes: Mapping[str, Size], sparsity: ArrayLike) -> dict[str, jax.Array]:
        shapes = [s.shape if kernels else s.shape[-2:] for s in sizes.values()]
        raw = np.array([sum(shape) / max(np.prod(shape), 1) for shape in shapes])
        counts = [s.size for s in sizes.values()] if of == "entries" else _operations(sizes)
        count = np.array(counts, np.float64)
        order = np.argsort(-raw, kind="stable")
        raw, count = raw[order], count[order]
        # With the first j parameters dense, the others share what is left.
        dense = np.concatenate([[0.0], np.cumsum(count)[:-1]])
        weight = np.cumsum((raw * count)[::-1])[::-1]
        left = (1 - jnp.asarray(sparsity, jnp.float32)) * count.sum()
        epsilon = (left - jnp.asarray(dense, jnp.float32)) / jnp.asarray(weight, jnp.float32)
        # The densities of the first one that would not be dense too are at most 1.
        fits = epsilon * jnp.asarray(raw, jnp.float32) <= 1
        chosen = jnp.where(jnp.any(fits), epsilon[jnp.argmax(fits)], jnp.inf)
        density = jnp.minimum(chosen * jnp.asarray(raw, jnp.float32), 1)
        paths = list(sizes)
        return {paths[i]: 1 - density[at] for at, i in enumerate(order)}

    return spread


def _operations(sizes: Mapping[str, Size]) -> list[int]:
    """The operations of each parameter.

    Raises:
        ValueError: Those of some are not known.
    """
    unknown = [path for path, size in sizes.items() if not size.flops]
    if unknown:
        raise ValueError(
            f"erk(of='flops'): no operations are known of {', '.join(map(repr, unknown))}: pass "
            "uses=jaxopt_compress.uses(fn, params, *args), and leave out with where= what meets no "
            "product or a loop of unknown length"
        )
    return [size.flops for size in sizes.values() if size.flops]


__all__ = ["Distribution", "Size", "erk"]
