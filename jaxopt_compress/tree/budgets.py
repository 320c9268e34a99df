"""Budgets that several parameters share."""

from typing import NamedTuple


class Bytes(NamedTuple):
    """A budget of stored bytes.

    Attributes:
        share: The share of the bytes of all parameters before compression.
    """

    share: float


def bytes(share: float) -> Bytes:
    """A budget: at most this share of the bytes of all parameters.

    Args:
        share: Above 0, and at most 1.

    Returns:
        The budget, for `allocate` and `low_rank`.

    Raises:
        ValueError: ``share`` is out of that range.

    Example:
        >>> import jaxopt_compress as jc
        >>> jc.bytes(0.25)
        Bytes(share=0.25)
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"bytes({share!r}): it is the share that is left, above 0, at most 1")
    return Bytes(float(share))


class Flops(NamedTuple):
    """A budget of floating-point operations.

    Attributes:
        share: The largest share of the operations that may be left.
    """

    share: float


def flops(share: float) -> Flops:
    """A budget: at most this share of the operations of a function is left.

    Products and convolutions are counted, two operations for each multiplication, times the length
    of the scans around them. `Groups.plan` counts those of the whole function, loops of unknown
    length once, and branches all; `low_rank` those with the parameters that it chooses.

    Args:
        share: Above 0, and below 1.

    Returns:
        The budget, for `Groups.plan` and `low_rank`.

    Raises:
        ValueError: ``share`` is no such number.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
        >>> params = {"w": jnp.eye(4), "v": jnp.ones((4, 2))}
        >>> plan = jc.find_groups(fn, params, jnp.ones((1, 4))).plan(budget=jc.flops(0.5))
        >>> plan.flops
        (48, 24)
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"flops({share!r}): it is the share that is left, above 0 and below 1")
    return Flops(float(share))


class Traffic(NamedTuple):
    """A budget of the bytes of parameters that a call reads; `jaxopt_compress.traffic` makes it.

    Attributes:
        share: The share of the bytes read before compression; None for ``most``.
        most: So many bytes; None for ``share``.
    """

    share: float | None
    most: float | None = None


__all__ = ["Bytes", "Flops", "Traffic", "bytes", "flops"]
