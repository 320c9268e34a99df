"""The roles of axes where nobody says them."""

import warnings

from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.tree.paths import Where


class AssumedLayout(UserWarning):
    """The axes of a parameter were assumed, since neither uses nor a layout were given."""


LAYOUTS = ("in,out", "out,in")


def assume_layout(shape: tuple[int, ...], layout: str = "in,out") -> Layout:
    """The layout of a kernel: as Flax writes it, output last, or as PyTorch does, output first.

    Rank 4 is taken for a convolution, such as ``(height, width, in, out)``; in rank 3 and above 4
    the leading axes are taken for stacks, which is never wrong in its results, only finer than need
    be.

    Raises:
        ValueError: ``layout`` is neither ``"in,out"`` nor ``"out,in"``.

    Example:
        >>> assume_layout((64, 32))
        Layout(contracting=(-2,), output=(-1,), stack=())
        >>> assume_layout((64, 32), "out,in")
        Layout(contracting=(-1,), output=(-2,), stack=())
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}; there are {' and '.join(map(repr, LAYOUTS))}")
    ndim = len(shape)
    if ndim <= 1:
        return Layout((), tuple(range(-ndim, 0)))
    depth = {2: 1, 3: 1}.get(ndim, 3)
    stack = tuple(range(-ndim, -1 - depth))
    if layout == "out,in":
        return Layout(tuple(range(-depth, 0)), (-1 - depth,), stack)
    return Layout(tuple(range(-1 - depth, -1)), (-1,), stack)


def warn_assumed(paths: list[str], where: Where) -> None:
    """Says which leaves got an assumed layout."""
    if paths:
        warnings.warn(
            f"assumed the axes of {', '.join(paths)} (last axis: output; rank 4: convolution; "
            "other leading axes: stacked layers), which decides on scales and groups: pass "
            "uses=jaxopt_compress.uses(fn, params, *args) to take them from the function, or say "
            "layout='in,out' or layout='out,in'",
            AssumedLayout,
            stacklevel=4,
        )
