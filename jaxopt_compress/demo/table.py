"""The table of the results."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxopt_compress.extras import require


class Row(NamedTuple):
    """What was measured of one network; shares are in [0, 1].

    Attributes:
        variant: Its name.
        accuracy: On the test images.
        macro_f1: Likewise.
        agreement: The share of test images with the same answer as the dense network.
        one_shot_accuracy: Of the same compression of the dense network, without training.
        stored_bytes: `jaxopt_compress.nbytes`.
        ratio: Stored bytes of the dense network over those of this one.
        bits_per_weight: Stored bits over the number of weights.
    """

    variant: str
    accuracy: float
    macro_f1: float
    agreement: float
    one_shot_accuracy: float
    stored_bytes: int
    ratio: float
    bits_per_weight: float


def table(
    rows: Sequence[Row],
    times: Mapping[str, float],
    device: str,
    batch: int,
) -> Any:
    """A table to print.

    Args:
        rows: The first is the dense network.
        times: Milliseconds per batch by variant.
        device: Where they were measured.
        batch: Images per batch.
    """
    out = require("rich.table", extra="examples").Table(
        title=f"{batch} test images, before (dense) and after compression",
        caption="one shot: accuracy when compressed without training.\n"
        f"ms: median time of a compiled batch of {batch} on this {device};\n"
        "CPU times say little about accelerators.",
        title_justify="left",
        caption_justify="left",
        box=require("rich.box", extra="examples").SIMPLE_HEAD,
        padding=0,
    )
    out.add_column("variant", no_wrap=True)
    titles = ("accu-\nracy %", "macro\nF1 %", "agrees\n%", "one\nshot %", "stored\nbytes")
    for title in (*titles, "ratio", "bits/\nweight", "ms"):
        out.add_column(title, justify="right", no_wrap=True)
    percent = lambda share: f"{100 * share:.1f}"
    for row in rows:
        out.add_row(
            row.variant,
            *map(percent, (row.accuracy, row.macro_f1, row.agreement, row.one_shot_accuracy)),
            f"{row.stored_bytes:,}",
            f"{row.ratio:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{times[row.variant]:.2f}",
        )
    return out
