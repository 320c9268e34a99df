"""Budgets that several parameters share."""

from typing import NamedTuple


class Bytes(NamedTuple):
    """A budget of stored bytes.

    Attributes:
        share: Of the bytes of all parameters as they are.
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


__all__ = ["Bytes", "bytes"]
