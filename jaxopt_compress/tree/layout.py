"""The roles of axes where nobody says them."""

import warnings

from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.tree.paths import Where


class AssumedLayout(UserWarning):
    """The axes of a parameter of rank 3 or more were assumed, since no uses were given."""


def assume_layout(shape: tuple[int, ...]) -> Layout:
    """The layout of a Flax kernel: output last, contracting before it.

    Rank 4 is taken for a convolution ``(height, width, in, out)``; in rank 3 and above 4 the
    leading axes are taken for stacks, which is never wrong in its results, only finer than need be.

    Example:
        >>> assume_layout((64, 32))
        Layout(contracting=(-2,), output=(-1,), stack=())
    """
    ndim = len(shape)
    if ndim <= 1:
        return Layout((), tuple(range(-ndim, 0)))
    depth = {2: 1, 3: 1}.get(ndim, 3)
    contracting = tuple(range(-1 - depth, -1))
    return Layout(contracting, (-1,), tuple(range(-ndim, -1 - depth)))


def warn_assumed(paths: list[str], where: Where) -> None:
    """Says which leaves got an assumed layout."""
    if paths:
        warnings.warn(
            f"assumed the axes of {', '.join(paths)} (last axis: output; rank 4: convolution; "
            "other leading axes: stacked layers); pass uses=jaxopt_compress.uses(fn, params, *args)"
            " to take them from the function",
            AssumedLayout,
            stacklevel=4,
        )
