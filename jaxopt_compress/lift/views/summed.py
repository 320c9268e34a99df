"""Views of sums: sums of views."""

from collections.abc import Callable

from jaxopt_compress.arrays import SumArray
from jaxopt_compress.lift.views import base
from jaxopt_compress.typing import Value


def _of_parts(view: Value) -> None:
    @view.register
    def _(w: SumArray, how: Value) -> SumArray:
        return w.each(lambda part: view(part, how))


_VIEWS: tuple[Callable[..., Value], ...] = (
    base.transposed,
    base.cut,
    base.reshaped,
    base.flipped,
    base.scaled,
    base.rescaled,
    base.cast,
    base.stacked,
)
for _view in _VIEWS:
    _of_parts(_view)
