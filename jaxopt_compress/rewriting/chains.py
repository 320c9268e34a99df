"""Products followed by per-channel affine equations whose vectors depend on parameters only."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxopt_compress.lift._compat import source_line
from jaxopt_compress.rewriting.axes import moved, shape_of
from jaxopt_compress.rewriting.sources import Sources, numbers, trace
from jaxopt_compress.rewriting.staging import Staged, Step, run_step, value_of
from jaxopt_compress.typing import Leaf

Link = tuple[int, frozenset[int], int]  # a step, its parameters, the axis of channels after it


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


def analyze(staged: Staged) -> Analysis:
    """Finds all chains that can be folded."""
    at = trace(staged)
    chains: list[Chain] = []
    refused: dict[int, str] = {}
    for n, step in enumerate(staged.steps):
        root = None if n in at.fixed else _product(step, at.plain)
        if root is None:
            continue
        found = _follow(staged, n, root[2], at)
        if any(_name(staged, i) in ("mul", "div") and from_ for i, from_, _ in found):
            chain = _chain(staged, n, root, found, at)
            if isinstance(chain, Chain):
                chains.append(chain)
            else:
                refused[at.plain[step.inputs[root[0]]][0]] = f"{chain} at {source_line(step.eqn)}"
    for leaf, line in _missed(staged, at).items():
        if leaf not in {chain.weight for chain in chains}:
            why = "its result is multiplied by parameters, but not in a form that can be folded,"
            refused.setdefault(leaf, f"{why} at {line}")
    return Analysis(chains, refused, at.fixed)


def _name(staged: Staged, n: int) -> str:
    return staged.steps[n].eqn.primitive.name


def _chain(
    staged: Staged, n: int, root: tuple[int, int, int], found: list[Link], at: Sources
) -> Chain | str:
    """The chain of a product and the steps after it, or why it cannot be folded."""
    step = staged.steps[n]
    side, weight_axis, _ = root
    weight, axes = at.plain[step.inputs[side]]
    leaf_axis = axes[weight_axis]
    used = frozenset[int]().union(*(from_ for _, from_, _ in found))
    inside = {n, *(i for i, _, _ in found)}
    added = [from_ for i, from_, _ in found if _name(staged, i) in ("add", "sub")]
    homes = [next(iter(from_)) for from_ in added if len(from_) == 1]
    if leaf_axis is None:
        return "its output channels have no axis of their own in it"
    if at.reached[weight] != {n} or any(at.reached[i] - inside for i in used):
        return "it or its norm is used elsewhere too, beside"
    if added and not homes:
        return "no parameter of its own is added that could hold the bias"
    if homes and _leaf_size(staged, homes[-1]) != shape_of(step, side)[weight_axis]:
        return "what is added has not one entry per channel"
    bias = homes[-1] if homes else None
    steps, _, channels = zip(*found, strict=True)
    return Chain(n, steps, weight, leaf_axis, channels, bias, tuple(sorted(used - {bias})))


def _missed(staged: Staged, at: Sources) -> dict[int, str]:
    """Weights whose results are multiplied by a vector of parameters, with the line."""
    found: dict[int, str] = {}
    behind: dict[int, frozenset[int]] = {}  # the weights of the products that a value is linear in
    for n, step in enumerate(staged.steps):
        if n in at.fixed:
            continue
        name, atoms = step.eqn.primitive.name, numbers(step.inputs)
        if name in ("dot_general", "conv_general_dilated"):
            from_ = [at.leaves[i] for i in atoms if i in at.leaves]
            behind[step.outputs[0]] = frozenset[int]().union(*from_)
            continue
        data = [i for i in atoms if i not in at.leaves]
        linear = name in ("add", "sub", "mul", "div", "neg", "slice", "pad", "reduce_sum")
        if len(data) != 1 or not (linear or moved(step) is not None):
            continue
        weights = behind.get(data[0], frozenset())
        behind[step.outputs[0]] = weights
        if name in ("mul", "div") and any(
            at.leaves.get(i) and at.varying.get(i, True) for i in atoms if i != data[0]
        ):
            for leaf in weights:
                found.setdefault(leaf, source_line(step.eqn))
    return found


def _leaf_size(staged: Staged, leaf: int) -> int:
    for step in staged.steps:
        for i, atom in enumerate(step.inputs):
            if not isinstance(atom, core.Literal) and atom == leaf:
                return math.prod(shape_of(step, i))
    return 0


def _product(
    step: Step, plain: dict[int, tuple[int, tuple[int | None, ...]]]
) -> tuple[int, int, int] | None:
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
            i for i in range(len(shape_of(step, side))) if i not in (*contract[side], *batch[side])
        ]
        if len(free) == 1 and not batch[side]:
            rank = len(step.out.shape)
            return side, free[0], 0 if side == 0 else rank - 1
    return None


def _follow(staged: Staged, start: int, channel: int, at: Sources) -> list[Link]:
    """The steps after a product that keep it affine per channel, with parameters and axis."""
    found: list[Link] = []
    last = 0
    value = staged.steps[start].outputs[0]
    while len(at.readers.get(value, [])) == 1 and at.readers[value] != [-1]:
        n = at.readers[value][0]
        step = staged.steps[n]
        axes = moved(step) if len(step.inputs) == 1 else None
        if axes is not None and channel in axes:
            channel = axes.index(channel)
            found.append((n, frozenset(), channel))
        elif (from_ := _affine_step(step, value, channel, at)) is not None:
            found.append((n, from_, channel))
            last = len(found)
        else:
            break
        value = step.outputs[0]
    return found[:last]


def _affine_step(step: Step, value: int, channel: int, sources: Sources) -> frozenset[int] | None:
    """The parameters of a step that is affine in ``value`` per channel; None if it is not."""
    name = step.eqn.primitive.name
    at = [i for i, a in enumerate(step.inputs) if not isinstance(a, core.Literal) and a == value]
    if name not in ("add", "sub", "mul", "div") or len(at) != 1 or (name == "div" and at != [0]):
        return None
    other, shape = step.inputs[1 - at[0]], shape_of(step, 1 - at[0])
    all_axes = frozenset(i for i, k in enumerate(shape) if k > 1)
    if isinstance(other, core.Literal):
        from_, axes = frozenset[int](), all_axes
    elif other in sources.leaves:
        from_, axes = sources.leaves[other], sources.varying.get(other, all_axes)
    else:
        return None
    same = step.out.shape == shape_of(step, at[0])
    return from_ if axes <= {channel} and same else None


def affine(
    staged: Staged, chain: Chain, fixed: set[int], leaves: list[Leaf]
) -> tuple[jax.Array, jax.Array]:
    """``(a, b)``, one entry per channel: the chain is ``a * product + b``."""
    env = {**staged.constants, **dict(enumerate(leaves))}
    needed: set[int] = set()
    want = {i for n in chain.steps for i in numbers(staged.steps[n].inputs)}
    for n in sorted(fixed, reverse=True):
        if want & set(staged.steps[n].outputs):
            needed.add(n)
            want |= set(numbers(staged.steps[n].inputs))
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
