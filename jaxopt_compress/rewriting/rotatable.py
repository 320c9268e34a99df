"""The streams of a function that can be rotated, and what each parameter takes part in."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.hadamard import transform_sizes
from jaxopt_compress.rewriting.bases import Turn, Use
from jaxopt_compress.rewriting.staging import Staged, shapes
from jaxopt_compress.rewriting.streams import Streams
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import PyTree, Value


class Rotatable:
    """The streams of a function that can be rotated, by paths.

    Hadamard matrices rotate streams of an even number of channels, others any number (``odd``).
    """

    def __init__(self, staged: Staged, params: PyTree, turned: frozenset[str], odd: bool = False):
        names = [path for path, _ in named_leaves(params)]
        structs = jax.tree.leaves(shapes(params))
        self._staged, self._names, self._odd = staged, names, odd
        numbers = frozenset(i for i, path in enumerate(names) if path in turned)
        walk = Streams(staged, structs, numbers)
        # Blocking one group may leave a parameter half rotated, which blocks the next.
        while self._settle(walk, structs):
            pass
        self.conflicts = self._conflicts(walk)
        self.axes: dict[str, dict[int, int]] = {}
        self.scales: dict[str, tuple[int, str]] = {}
        self.sizes: list[int] = []
        self.skipped: dict[str, str] = {}
        order: dict[int, int] = {}
        for i, uses in walk.uses.items():
            for met in (m for use in uses for m in use.met):
                group = walk.find(met.group)
                reason = walk.groups[group].reason
                if reason:
                    self.skipped.setdefault(names[i], reason)
                    continue
                if met.scale == i:
                    continue
                if group not in order:
                    order[group] = len(order)
                    self.sizes.append(walk.groups[group].size)
                self.axes.setdefault(names[i], {})[met.axis] = order[group]
                if met.scale is not None:
                    self.scales[names[i]] = met.axis, names[met.scale]
        for path in self.axes:
            self.skipped.pop(path, None)
        live = {n: turn for n, turn in walk.turns.items() if walk.find(turn.group) in order}
        self.turns = {n: Turn(order[walk.find(t.group)], t.axis) for n, t in live.items()}

    def streams_of(self, n: int) -> int:
        """Which operand of a step that was turned is the stream: not the parameter's."""
        step = self._staged.steps[n]
        return 1 if self._is_scale(step.inputs[0]) else 0

    def _is_scale(self, atom: Value) -> bool:
        """Whether a value comes from parameters alone."""
        known = set(range(self._staged.leaves)) | set(self._staged.constants)
        for step in self._staged.steps:
            if all(not isinstance(i, int) or i in known for i in step.inputs):
                known.update(step.outputs)
        return not isinstance(atom, int) or atom in known

    def _settle(self, walk: Streams, structs: list[jax.ShapeDtypeStruct]) -> bool:
        """Blocks what cannot be rotated; whether anything new was blocked."""
        blocked = sum(g.reason is not None for g in walk.groups)
        for i, uses in walk.uses.items():
            for use in uses:
                self._block_use(walk, i, use, uses)
        for number, group in enumerate(walk.groups):
            fits = self._odd or transform_sizes(group.size)
            if walk.find(number) == number and not fits:
                walk.block(number, f"it has an odd number of channels, {group.size}")
        for i, uses in walk.uses.items():
            if not jnp.issubdtype(structs[i].dtype, jnp.floating):
                for m in (m for use in uses for m in use.met):
                    walk.block(m.group, f"{self._names[i]!r} holds no real numbers")
        return sum(g.reason is not None for g in walk.groups) > blocked

    def _block_use(self, walk: Streams, i: int, use: Use, uses: Sequence[Use]) -> None:
        """Every equation that meets a parameter has to take the same axes of it for the same."""
        own = {(m.axis, walk.find(m.group)) for m in use.met}
        for m in (m for other in uses for m in other.met):
            group = walk.find(m.group)
            if (m.axis, group) not in own:
                walk.block(group, f"{self._names[i]!r} is used in another way at {use.line}")

    def _conflicts(self, walk: Streams) -> dict[int, bool]:
        """Scales that cannot be folded -> whether they can be applied in the original basis."""
        found: dict[int, bool] = {}
        for uses in walk.uses.values():
            scales: dict[int, set[int | None]] = {}
            for m in (
                m for use in uses for m in use.met if not walk.groups[walk.find(m.group)].reason
            ):
                scales.setdefault(m.axis, set()).add(m.scale)
            for own in scales.values():
                if len(own) > 1:
                    found.update({s: all(walk.scales[s]) for s in own if s is not None})
        return found
