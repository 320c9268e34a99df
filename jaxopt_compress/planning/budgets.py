"""Budgets of what a table of sensitivities counts."""

from jaxopt_compress.planning.chips import Chip, chip_of
from jaxopt_compress.tree.budgets import Bytes, Flops, Traffic


def traffic(
    share: float | None = None, *, microseconds: float | None = None, chip: str | Chip | None = None
) -> Traffic:
    """A budget: at most so many bytes of parameters are read by a call.

    Each parameter is read once, in its stored form; tables that are only looked up count as
    nothing. It bounds the time of calls that wait for memory, such as those that make one token.

    Args:
        share: The share of the bytes read before compression, above 0 and at most 1.
        microseconds: In the place of a share: no more than the memory of a chip brings in that
            time.
        chip: Whose memory, by name or a `jaxopt_compress.planning.Chip`, as `plan` takes it.

    Returns:
        The budget, for `allocate` and `low_rank`.

    Raises:
        ValueError: Not one of the two ways, or a number that is none.

    Example:
        >>> import jaxopt_compress as jc
        >>> jc.traffic(0.25)
        Traffic(share=0.25, most=None)
        >>> jc.traffic(microseconds=100, chip="tpu v5e")
        Traffic(share=None, most=81900000.0)
    """
    if share is not None and microseconds is None and chip is None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"traffic({share!r}): it is a share, above 0, at most 1")
        return Traffic(float(share))
    if share is not None or microseconds is None or chip is None:
        raise ValueError(
            "traffic takes a share, or microseconds= with chip=, such as traffic(0.25) and "
            "traffic(microseconds=100, chip='tpu v5e')"
        )
    if not microseconds > 0:
        raise ValueError(f"traffic(microseconds={microseconds!r}): it is a time, above 0")
    return Traffic(None, microseconds * 1e-6 * chip_of(chip).bytes_per_second)


Budget = Bytes | Flops | Traffic

__all__ = ["Budget", "Bytes", "Flops", "Traffic", "traffic"]
