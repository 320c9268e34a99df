"""What chips can do, as published: bytes and operations per second."""

import difflib
from typing import NamedTuple


class Chip(NamedTuple):
    """Peak rates of one chip.

    Attributes:
        name: The name of the chip.
        bytes_per_second: The bandwidth of its main memory.
        flops: Floating operations per second of dense bfloat16 products.
        int8_ops: The same of int8 products.
        memory: Its bytes.
        source: Where these are published.
    """

    name: str
    bytes_per_second: float
    flops: float
    int8_ops: float
    memory: float
    source: str


_TPU = "cloud.google.com/tpu/docs/{}, system architecture"
_CHIPS = (
    Chip("tpu v4", 1228e9, 275e12, 275e12, 32 * 2**30, _TPU.format("v4")),
    Chip("tpu v5e", 819e9, 197e12, 394e12, 16 * 2**30, _TPU.format("v5e")),
    Chip("tpu v5p", 2765e9, 459e12, 918e12, 95 * 2**30, _TPU.format("v5p")),
    Chip("tpu v6e", 1640e9, 918e12, 1836e12, 32 * 2**30, _TPU.format("v6e")),
    Chip("a100", 2039e9, 312e12, 624e12, 80e9, "NVIDIA A100 80GB SXM datasheet"),
    Chip("h100", 3350e9, 989e12, 1979e12, 80e9, "NVIDIA H100 SXM datasheet, without sparsity"),
    Chip("h200", 4800e9, 989e12, 1979e12, 141e9, "NVIDIA H200 SXM datasheet, without sparsity"),
)


def chip_of(chip: str | Chip) -> Chip:
    """The chip of a name, or a chip of one's own.

    Raises:
        ValueError: An unknown name; says which there are.
    """
    if isinstance(chip, Chip):
        return chip
    known = {each.name: each for each in _CHIPS}
    if chip not in known:
        near = difflib.get_close_matches(str(chip), known, n=1, cutoff=0.0)
        raise ValueError(
            f"chip={chip!r}; did you mean {near[0]!r}? There are {', '.join(known)}; others are a "
            "jaxopt_compress.planning.Chip"
        )
    return known[chip]
