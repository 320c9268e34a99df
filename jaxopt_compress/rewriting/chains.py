"""Products followed by per-channel affine equations whose vectors depend on parameters only."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxopt_compress.lift._compat import source_line
from jaxopt_compress.rewriting.axes import moved
from jaxopt_compress.rewriting.staging import Staged, Step, run_step, value_of

_ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "max", "min", "integer_pow", "pow",
    "square", "convert_element_type", "copy",
}  # fmt: skip


class Chain(NamedTuple):
    """A product and the affine equations after it; parameters by their number.

    Attributes:
        product: The index of the product's step.
        steps: The indices of the steps of the chain, in order: affine ones, and casts and moves
            of axes between them.
        weight: The number of the product's parameter.
        weight_axis: Its axis of output channels.
        channels: The axis of channels in the result of each step.
        bias: The parameter that takes the folded bias; None if nothing is added.
        dropped: The parameters that only the chain reads.
    """

    product: int
    steps: tuple[int, ...]
    weight: int
    weight_axis: int
    channels: tuple[int, ...]
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
    aval: Any = step.eqn.invars[i].aval
    return tuple(aval.shape)


def analyze(staged: Staged) -> Analysis:
    """Finds all chains that can be folded."""
    sources: dict[int, frozenset[int]] = {i: frozenset([i]) for i in range(staged.leaves)}
    sources.update((i, frozenset()) for i in staged.constants)
    varying: dict[int, frozenset[int]] = {}
    # Parameters, cast and moved: the number, and its axis for each axis of the value.
    plain: dict[int, tuple[int, tuple[int | None, ...]]] = {}
    fixed: set[int] = set()
    readers: dict[int, list[int]] = {}
    for n, step in enumerate(staged.steps):
        for k, i in enumerate(step.inputs):
            if not isinstance(i, core.Literal) and i < staged.leaves:
                plain[i] = i, tuple(range(len(_shape(step, k))))
        for i in set(_numbers(step.inputs)):
            readers.setdefault(i, []).append(n)
        if all(i in sources for i in _numbers(step.inputs)) and not step.eqn.effects:
            fixed.add(n)
            from_ = frozenset[int]().union(*(sources[i] for i in _numbers(step.inputs)))
            for out, var in zip(step.outputs, step.eqn.outvars, strict=True):
                sources[out] = from_
                varying[out] = _varying(step, var.aval.shape, varying)
            axes = moved(step) if len(_numbers(step.inputs)) == len(step.inputs) == 1 else None
            if axes is not None and step.inputs[0] in plain:
                leaf, old = plain[step.inputs[0]]
                plain[step.outputs[0]] = leaf, tuple(None if k is None else old[k] for k in axes)
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
        root = None if n in fixed else _product(step, plain)
        if root is None:
            continue
        side, weight_axis, channel = root
        found = _follow(staged, n, channel, sources, varying, readers)
        weight, axes = plain[step.inputs[side]]
        used = frozenset[int]().union(*(from_ for _, from_, _ in found))
        if not any(
            from_ and staged.steps[i].eqn.primitive.name in ("mul", "div") for i, from_, _ in found
        ):
            continue
        line = source_line(step.eqn)
        leaf_axis = axes[weight_axis]
        inside = {n, *(i for i, _, _ in found)}
        outside = [i for i in (weight, *used) if reached[i] - inside]
        size = _shape(step, side)[weight_axis]
        homes = [
            next(iter(from_))
            for i, from_, _ in found
            if len(from_) == 1 and staged.steps[i].eqn.primitive.name in ("add", "sub")
        ]
        added = any(staged.steps[i].eqn.primitive.name in ("add", "sub") for i, _, _ in found)
        if leaf_axis is None:
            refused[weight] = f"its output channels have no axis of their own in it at {line}"
        elif outside or reached[weight] != {n}:
            refused[weight] = f"it or its norm is used elsewhere too, beside {line}"
        elif added and not homes:
            refused[weight] = f"no parameter of its own is added that could hold the bias at {line}"
        elif homes and _leaf_size(staged, homes[-1]) != size:
            refused[weight] = f"what is added has not one entry per channel at {line}"
        else:
            bias = homes[-1] if homes else None
            dropped = tuple(sorted(used - {bias}))
            steps, _, at = zip(*found, strict=True)
            chains.append(Chain(n, steps, weight, leaf_axis, at, bias, dropped))
    for leaf, line in _missed(staged, sources, varying, readers, fixed).items():
        if leaf not in {chain.weight for chain in chains}:
            why = "its result is multiplied by parameters, but not in a form that can be folded,"
            refused.setdefault(leaf, f"{why} at {line}")
    return Analysis(chains, refused, fixed)


def _missed(
    staged: Staged, sources: Any, varying: Any, readers: Any, fixed: set[int]
) -> dict[int, str]:
    """Weights whose results are multiplied by a vector of parameters, with the line."""
    found: dict[int, str] = {}
    behind: dict[int, frozenset[int]] = {}  # the weights of the products that a value is linear in
    for n, step in enumerate(staged.steps):
        if n in fixed:
            continue
        name, atoms = step.eqn.primitive.name, _numbers(step.inputs)
        if name in ("dot_general", "conv_general_dilated"):
            from_ = [sources[i] for i in atoms if i in sources]
            behind[step.outputs[0]] = frozenset[int]().union(*from_)
            continue
        data = [i for i in atoms if i not in sources]
        linear = name in ("add", "sub", "mul", "div", "neg", "slice", "pad", "reduce_sum")
        if len(data) != 1 or not (linear or moved(step) is not None):
            continue
        weights = behind.get(data[0], frozenset())
        behind[step.outputs[0]] = weights
        if name in ("mul", "div") and any(
            sources.get(i) and varying.get(i, True) for i in atoms if i != data[0]
        ):
            for leaf in weights:
                found.setdefault(leaf, source_line(step.eqn))
    return found


def _leaf_size(staged: Staged, leaf: int) -> int:
    for step in staged.steps:
        for i, atom in enumerate(step.inputs):
            if not isinstance(atom, core.Literal) and atom == leaf:
                return math.prod(_shape(step, i))
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


def _product(step: Step, plain: dict[int, Any]) -> tuple[int, int, int] | None:
    """The side of the parameter, its axis of output channels, and that of the result."""
    name, params = step.eqn.primitive.name, step.eqn.params
    sides = [i for i, a in enumerate(step.inputs) if isinstance(a, int) and a in plain]
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
            rank = len(step.out.shape)
            return side, free[0], 0 if side == 0 else rank - 1
    return None


def _follow(
    staged: Staged, start: int, channel: int, sources: Any, varying: Any, readers: Any
) -> list[tuple[int, frozenset[int], int]]:
    """The steps after a product that keep it affine per channel, with parameters and axis."""
    found: list[tuple[int, frozenset[int], int]] = []
    last = 0
    value = staged.steps[start].outputs[0]
    while len(readers.get(value, [])) == 1 and readers[value] != [-1]:
        n = readers[value][0]
        step = staged.steps[n]
        axes = moved(step) if len(step.inputs) == 1 else None
        if axes is not None and channel in axes:
            channel = axes.index(channel)
            found.append((n, frozenset(), channel))
        elif (from_ := _affine_step(step, value, channel, sources, varying)) is not None:
            found.append((n, from_, channel))
            last = len(found)
        else:
            break
        value = step.outputs[0]
    return found[:last]


def _affine_step(
    step: Step, value: int, channel: int, sources: Any, varying: Any
) -> frozenset[int] | None:
    """The parameters of a step that is affine in ``value`` per channel; None if it is not."""
    name = step.eqn.primitive.name
    at = [i for i, a in enumerate(step.inputs) if not isinstance(a, core.Literal) and a == value]
    if name not in ("add", "sub", "mul", "div") or len(at) != 1 or (name == "div" and at != [0]):
        return None
    other, shape = step.inputs[1 - at[0]], _shape(step, 1 - at[0])
    all_axes = frozenset(i for i, k in enumerate(shape) if k > 1)
    if isinstance(other, core.Literal):
        from_, axes = frozenset[int](), all_axes
    elif other in sources:
        from_, axes = sources[other], varying.get(other, all_axes)
    else:
        return None
    same = step.out.shape == _shape(step, at[0])
    return from_ if axes <= {channel} and same else None


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
    size = staged.steps[chain.steps[-1]].out.shape[chain.channels[-1]]
    a, b = jnp.ones(size), jnp.zeros(size)
    value = staged.steps[chain.product].outputs[0]
    for n, channel in zip(chain.steps, chain.channels, strict=True):
        step = staged.steps[n]
        if len(step.inputs) == 1:
            value = step.outputs[0]
            continue
        side = 0 if not isinstance(step.inputs[0], core.Literal) and step.inputs[0] == value else 1
        v = jnp.asarray(value_of(env, step.inputs[1 - side]))
        if v.ndim:
            keep = [slice(None) if i == channel else 0 for i in range(v.ndim)]
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
