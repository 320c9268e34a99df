"""Which parameters each value of a function depends on."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend import core

from jaxopt_compress.rewriting.axes import moved, shape_of
from jaxopt_compress.rewriting.staging import Staged, Step

ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "max", "min", "integer_pow", "pow",
    "square", "convert_element_type", "copy",
}  # fmt: skip


class Sources(NamedTuple):
    """What is known of each value; parameters and values by their number.

    Attributes:
        leaves: Value that depends on parameters and constants only -> the parameters.
        varying: Such a value -> the axes along which it may differ.
        plain: Value that is a parameter, cast or moved -> the parameter, and its axis for each
            axis of the value.
        fixed: The steps that read parameters and constants only.
        readers: Value -> the steps that read it; -1 is the function's result.
        reached: Parameter -> the steps on data that it reaches.
    """

    leaves: dict[int, frozenset[int]]
    varying: dict[int, frozenset[int]]
    plain: dict[int, tuple[int, tuple[int | None, ...]]]
    fixed: set[int]
    readers: dict[int, list[int]]
    reached: dict[int, set[int]]


def numbers(atoms: Iterable[int | core.Literal]) -> list[int]:
    """The values among operands; the rest are literals."""
    return [a for a in atoms if not isinstance(a, core.Literal)]


def trace(staged: Staged) -> Sources:
    """Follows the parameters through a function."""
    sources: dict[int, frozenset[int]] = {i: frozenset([i]) for i in range(staged.leaves)}
    sources.update((i, frozenset()) for i in staged.constants)
    at = Sources(sources, {}, {}, set(), {}, {})
    for n, step in enumerate(staged.steps):
        for k, i in enumerate(step.inputs):
            if not isinstance(i, core.Literal) and i < staged.leaves:
                at.plain[i] = i, tuple(range(len(shape_of(step, k))))
        read = numbers(step.inputs)
        for i in set(read):
            at.readers.setdefault(i, []).append(n)
        if all(i in sources for i in read) and not step.eqn.effects:
            at.fixed.add(n)
            from_ = frozenset[int]().union(*(sources[i] for i in read))
            for out, var in zip(step.outputs, step.eqn.outvars, strict=True):
                aval: Any = var.aval
                sources[out] = from_
                at.varying[out] = _varying(step, aval.shape, at.varying)
            axes = moved(step) if len(read) == len(step.inputs) == 1 else None
            if axes is not None and read[0] in at.plain:
                leaf, old = at.plain[read[0]]
                at.plain[step.outputs[0]] = leaf, tuple(None if k is None else old[k] for k in axes)
    for i in numbers(staged.outputs):
        at.readers.setdefault(i, []).append(-1)
    for i, from_ in sources.items():
        for leaf in from_:
            on_data = (n for n in at.readers.get(i, []) if n not in at.fixed)
            at.reached.setdefault(leaf, set()).update(on_data)
    return at


def _varying(
    step: Step, shape: tuple[int, ...], varying: dict[int, frozenset[int]]
) -> frozenset[int]:
    """The axes along which a value may differ; the others have a single value."""
    name = step.eqn.primitive.name
    every = frozenset(i for i, n in enumerate(shape) if n > 1)
    if name == "broadcast_in_dim":
        at, old = step.eqn.params["broadcast_dimensions"], shape_of(step, 0)
        atom = step.inputs[0]
        inner = (
            range(len(old))
            if isinstance(atom, core.Literal)
            else varying.get(atom, range(len(old)))
        )
        return frozenset(at[i] for i in inner if old[i] > 1) & every
    if name in ELEMENTWISE:
        axes = frozenset[int]()
        for i, atom in enumerate(step.inputs):
            old = shape_of(step, i)
            all_axes = frozenset(k for k, size in enumerate(old) if size > 1)
            axes |= all_axes if isinstance(atom, core.Literal) else varying.get(atom, all_axes)
        return axes & every
    return every
