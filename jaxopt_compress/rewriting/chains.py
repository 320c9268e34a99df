"""Products followed by per-channel affine equations whose vectors depend on parameters only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxopt_compress.lift._compat import source_line
from jaxopt_compress.rewriting.staging import Staged, Step, run_step, value_of

_ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "max", "min", "integer_pow", "pow",
    "square", "convert_element_type", "copy",
}  # fmt: skip


class Chain(NamedTuple):
    """A product and the affine equations after it; parameters by their number.

    Attributes:
        product: The index of the product's step.
        steps: The indices of the steps of the chain, in order.
        weight: The number of the product's parameter.
        weight_axis: Its axis of output channels.
        channel: The axis of channels in the product's result.
        bias: The parameter that takes the folded bias; None if nothing is added.
        dropped: The parameters that only the chain reads.
    """

    product: int
    steps: tuple[int, ...]
    weight: int
    weight_axis: int
    channel: int
    bias: int | None
    dropped: tuple[int, ...]


class Analysis(NamedTuple):
    """What was found: chains, what was refused and why, and which steps read parameters only."""

    chains: list[Chain]
    refused: dict[int, str]
    fixed: set[int]


def _numbers(atoms: Any) -> list[int]:
    return [a for a in atoms if not isinstance(a, core.Literal)]


def _shape(step: Step, i: int) -> tuple[int, ...]:
    return tuple(step.eqn.invars[i].aval.shape)


def analyze(staged: Staged) -> Analysis:
    """Finds all chains that can be folded."""
    sources: dict[int, frozenset[int]] = {i: frozenset([i]) for i in range(staged.leaves)}
    sources.update((i, frozenset()) for i in staged.constants)
    varying: dict[int, frozenset[int]] = {}
    fixed: set[int] = set()
    readers: dict[int, list[int]] = {}
    for n, step in enumerate(staged.steps):
        for i in set(_numbers(step.inputs)):
            readers.setdefault(i, []).append(n)
        if all(i in sources for i in _numbers(step.inputs)) and not step.eqn.effects:
            fixed.add(n)
            from_ = frozenset[int]().union(*(sources[i] for i in _numbers(step.inputs)))
            for out, var in zip(step.outputs, step.eqn.outvars, strict=True):
                sources[out] = from_
                varying[out] = _varying(step, var.aval.shape, varying)
    for i in _numbers(staged.outputs):
        readers.setdefault(i, []).append(-1)
    # The equations on data that each parameter reaches.
    reached: dict[int, set[int]] = {}
    for i, from_ in sources.items():
        for leaf in from_:
            reached.setdefault(leaf, set()).update(n for n in readers.get(i, []) if n not in fixed)

    chains: list[Chain] = []
    refused: dict[int, str] = {}
    for n, step in enumerate(staged.steps):
        root = None if n in fixed else _product(step, staged.leaves)
        if root is None:
            continue
        side, weight_axis, channel = root
        found = _follow(staged, n, channel, sources, varying, readers)
        weight = step.inputs[side]
        used = frozenset[int]().union(*(from_ for _, from_ in found))
        if not any(
            from_ and staged.steps[i].eqn.primitive.name in ("mul", "div") for i, from_ in found
        ):
            continue
        line = source_line(step.eqn)
        inside = {n, *(i for i, _ in found)}
        outside = [i for i in (weight, *used) if reached[i] - inside]
        size = step.eqn.invars[side].aval.shape[weight_axis]
        homes = [
            next(iter(from_))
            for i, from_ in found
            if len(from_) == 1 and staged.steps[i].eqn.primitive.name in ("add", "sub")
        ]
        added = any(staged.steps[i].eqn.primitive.name in ("add", "sub") for i, _ in found)
        if outside or reached[weight] != {n}:
            refused[weight] = f"it or its norm is used elsewhere too, beside {line}"
        elif added and not homes:
            refused[weight] = f"no parameter of its own is added that could hold the bias at {line}"
        elif homes and _leaf_size(staged, homes[-1]) != size:
            refused[weight] = f"what is added has not one entry per channel at {line}"
        else:
            bias = homes[-1] if homes else None
            dropped = tuple(sorted(used - {bias}))
            steps = tuple(i for i, _ in found)
            chains.append(Chain(n, steps, weight, weight_axis, channel, bias, dropped))
    return Analysis(chains, refused, fixed)


def _leaf_size(staged: Staged, leaf: int) -> int:
    for step in staged.steps:
        for atom, var in zip(step.inputs, step.eqn.invars, strict=True):
            if not isinstance(atom, core.Literal) and atom == leaf:
                return var.aval.size
    return 0


def _varying(step: Step, shape: Any, varying: dict[int, frozenset[int]]) -> frozenset[int]:
    """The axes along which a value may differ; the others have a single value."""
    name = step.eqn.primitive.name
    every = frozenset(i for i, n in enumerate(shape) if n > 1)
    if name == "broadcast_in_dim":
        at, old = step.eqn.params["broadcast_dimensions"], _shape(step, 0)
        atom = step.inputs[0]
        inner = (
            range(len(old))
            if isinstance(atom, core.Literal)
            else varying.get(atom, range(len(old)))
        )
        return frozenset(at[i] for i in inner if old[i] > 1) & every
    if name in _ELEMENTWISE:
        axes = frozenset[int]()
        for i, atom in enumerate(step.inputs):
            old = _shape(step, i)
            all_axes = frozenset(k for k, size in enumerate(old) if size > 1)
            axes |= all_axes if isinstance(atom, core.Literal) else varying.get(atom, all_axes)
        return axes & every
    return every


def _product(step: Step, leaves: int) -> tuple[int, int, int] | None:
    """The side of the parameter, its axis of output channels, and that of the result."""
    name, params = step.eqn.primitive.name, step.eqn.params
    sides = [i for i, a in enumerate(step.inputs) if isinstance(a, int) and a < leaves]
    if name == "conv_general_dilated" and sides == [1] and params["batch_group_count"] == 1:
        numbers = params["dimension_numbers"]
        return 1, numbers.rhs_spec[0], numbers.out_spec[1]
    if name == "dot_general" and len(sides) == 1:
        contract, batch = params["dimension_numbers"]
        side = sides[0]
        free = [
            i for i in range(len(_shape(step, side))) if i not in (*contract[side], *batch[side])
        ]
        if len(free) == 1 and not batch[side]:
            rank = len(step.eqn.outvars[0].aval.shape)
            return side, free[0], 0 if side == 0 else rank - 1
    return None


def _follow(
    staged: Staged, start: int, channel: int, sources: Any, varying: Any, readers: Any
) -> list[tuple[int, frozenset[int]]]:
    """The steps after a product that keep it affine per channel, and the parameters of each."""
    found: list[tuple[int, frozenset[int]]] = []
    value = staged.steps[start].outputs[0]
    shape = staged.steps[start].eqn.outvars[0].aval.shape
    while readers.get(value, []) not in ([], [-1]) and len(readers[value]) == 1:
        n = readers[value][0]
        step = staged.steps[n] if n >= 0 else None
        if step is None or step.eqn.primitive.name not in ("add", "sub", "mul", "div"):
            break
        at = [
            i for i, a in enumerate(step.inputs) if not isinstance(a, core.Literal) and a == value
        ]
        if len(at) != 1 or (step.eqn.primitive.name == "div" and at != [0]):
            break
        other = step.inputs[1 - at[0]]
        if isinstance(other, core.Literal):
            from_ = frozenset[int]()
            axes = frozenset(i for i, k in enumerate(_shape(step, 1 - at[0])) if k > 1)
        elif other in sources:
            from_ = sources[other]
            all_axes = frozenset(i for i, k in enumerate(_shape(step, 1 - at[0])) if k > 1)
            axes = varying.get(other, all_axes)
        else:
            break
        if not axes <= {channel} or step.eqn.outvars[0].aval.shape != shape:
            break
        found.append((n, from_))
        value = step.outputs[0]
    return found


def affine(staged: Staged, chain: Chain, fixed: set[int], leaves: list[Any]) -> tuple[Any, Any]:
    """``(a, b)``, one entry per channel: the chain is ``a * product + b``."""
    env = {**staged.constants, **dict(enumerate(leaves))}
    needed: set[int] = set()
    want = {i for n in chain.steps for i in _numbers(staged.steps[n].inputs)}
    for n in sorted(fixed, reverse=True):
        if want & set(staged.steps[n].outputs):
            needed.add(n)
            want |= set(_numbers(staged.steps[n].inputs))
    for n in sorted(needed):
        run_step(env, staged.steps[n])
    root = staged.steps[chain.product].eqn.outvars[0].aval
    a, b = jnp.ones(root.shape[chain.channel]), jnp.zeros(root.shape[chain.channel])
    value = staged.steps[chain.product].outputs[0]
    for n in chain.steps:
        step = staged.steps[n]
        side = 0 if not isinstance(step.inputs[0], core.Literal) and step.inputs[0] == value else 1
        v = jnp.asarray(value_of(env, step.inputs[1 - side]))
        if v.ndim:
            keep = [slice(None) if i == chain.channel else 0 for i in range(v.ndim)]
            v = v[tuple(keep)]
        name = step.eqn.primitive.name
        if name == "sub":
            a, b = (a, b - v) if side == 0 else (-a, v - b)
        elif name == "add":
            b = b + v
        else:
            a, b = (a * v, b * v) if name == "mul" else (a / v, b / v)
        value = step.outputs[0]
    return a, jax.numpy.broadcast_to(b, a.shape)
