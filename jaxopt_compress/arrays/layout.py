"""Which axes of a parameter are summed over, and which are its outputs."""

import dataclasses

import jax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """The role of each axis of a parameter, as negative numbers; static.

    Attributes:
        contracting: Axes that the operation sums over.
        output: Axes that appear in its result.
        stack: Leading axes that are scanned, mapped or indexed over: each entry is a parameter of
            its own.
    """

    contracting: tuple[int, ...]
    output: tuple[int, ...]
    stack: tuple[int, ...] = ()

    @property
    def group_axis(self) -> int | None:
        """The axis along which groups run: the last contracting one."""
        return max(self.contracting, default=None)
