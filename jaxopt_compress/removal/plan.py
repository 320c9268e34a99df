"""A choice of units to remove, and what it can be turned into."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxopt_compress.compression import Compression
from jaxopt_compress.removal.masks import masks
from jaxopt_compress.removal.rewrite import Removed
from jaxopt_compress.rewriting.coupling.analysis import Frame, type_of
from jaxopt_compress.rewriting.coupling.replay import Gone
from jaxopt_compress.rewriting.report import Difference
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import PyTree

KeptIndices = dict[str, dict[int, list[int]]]


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """Which indices of parameters go.

    Attributes:
        fn: The function that groups were found on.
        params: Its parameters, or their types.
        units: Group -> the units that go; empty for a plan made from ``kept``.
        gone: Path -> per axis, booleans, true where an index goes; of parameters that shrink.
        inputs: Name -> likewise, of the inputs that shrink too.
        frame: What the groups were found with.
        inexact: For which operations the masked function differs from the removed one.
        flops: The floating-point operations of products and convolutions before and after.
        skip: Whether units are skipped where a maximum chooses.
    """

    fn: Callable[..., PyTree]
    params: PyTree
    units: dict[str, tuple[int, ...]]
    gone: dict[str, Gone]
    inputs: dict[str, Gone]
    frame: Frame
    inexact: tuple[str, ...]
    flops: tuple[int, int]
    skip: bool = False

    def __repr__(self) -> str:
        before, after = self.flops
        counts = ", ".join(f"{name}: {len(u)}" for name, u in self.units.items())
        # One that was read from indices knows no units.
        what = (
            f"{{{counts}}}" if self.units or not self.gone else f"indices of {', '.join(self.gone)}"
        )
        return f"<Plan that removes {what}, {after / max(before, 1):.1%} of the FLOPs left>"

    @property
    def kept(self) -> KeptIndices:
        """Path -> axis -> the indices that stay, of axes that shrink; a value for `json`.

        `Groups.plan` takes it back as ``kept=``.
        """
        return {
            path: {k: np.flatnonzero(~f).tolist() for k, f in enumerate(flags) if f.any()}
            for path, flags in self.gone.items()
        }

    @property
    def compression(self) -> Compression:
        """The masks as a compression: zeros at all coupled indices.

        It trains, chains and is stored as any other: its views are `MaskedArray` inside of chains,
        and its stored form is `SparseArray`. It chooses the floating parameters that shrink, of any
        rank.

        Raises:
            ValueError: Units are skipped, which masks do not do.
        """
        if self.skip:
            raise ValueError(
                "masks do not skip units: a softmax sees zeros in their place. Train the smaller "
                "parameters of rewrite(), or plan without skip=True"
            )
        floating = {path for path, x in named_leaves(self.params) if is_float(x)}
        return masks({path: flags for path, flags in self.gone.items() if path in floating})

    def rewrite(self, params: PyTree = None) -> Removed:
        """The smaller parameters, and functions rewritten to take them.

        Args:
            params: Parameters of the original shapes, such as those that training with
                ``compression`` left; by default those that groups were found on. Of types
                (`jax.ShapeDtypeStruct`) the smaller parameters are types too, so that a file of
                small parameters is run again without the whole ones.

        Returns:
            A `Rewrite`; its reference is the masked function, which skips units if the plan does.

        Raises:
            ValueError: A parameter has another shape.
        """
        params = self.params if params is None else params
        types = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
        shapes = jax.tree.map(type_of, self.params)
        empty = Removed(None, shapes, self.gone, self.inputs, self.frame, self.skip)
        smaller = jax.eval_shape(empty.tree, params) if types else empty.tree(params)
        return empty._replace(params=smaller)

    def check(
        self, params: PyTree, *args: PyTree, tolerance: float | None = None, **kwargs: Any
    ) -> Difference:
        """Measures the function of smaller parameters against that of masked ones.

        Args:
            params: Parameters of the original shapes.
            *args: The other arguments, whole.
            tolerance: The largest relative difference that does not raise; None never raises.
            **kwargs: Further arguments.

        Returns:
            The largest absolute and relative difference.
        """
        rewrite = self.rewrite(params)
        return rewrite.check(self.fn, *args, tolerance=tolerance, **kwargs)


def gone_from_kept(
    kept: Mapping[str, Mapping[Any, Sequence[int]]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Gone]:
    """Flags from ``Plan.kept``, also after a round trip through JSON.

    Raises:
        ValueError: A parameter, an axis or an index is not there.
    """
    found = {}
    for path, axes in kept.items():
        if path not in shapes:
            raise ValueError(f"kept= names {path!r}, and the parameters are {', '.join(shapes)}")
        flags = tuple(np.zeros(n, bool) for n in shapes[path])
        for axis, indices in axes.items():
            k, at = int(axis), np.asarray(indices, int)
            if not 0 <= k < len(flags) or (at < 0).any() or (at >= shapes[path][k]).any():
                raise ValueError(
                    f"kept= has axis {axis} of {path!r}, with indices up to {at.max(initial=0)}; "
                    f"its shape is {shapes[path]}"
                )
            flags[k][:] = True
            flags[k][at] = False
        found[path] = flags
    return found
