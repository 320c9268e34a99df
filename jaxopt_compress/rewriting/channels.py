"""Channels that products share: written by some weights and biases, read by others."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend import core

from jaxopt_compress.lift._compat import parts, scan_split, source_line
from jaxopt_compress.rewriting.axes import Product, merged, moved, pooled, product
from jaxopt_compress.rewriting.members import (
    ZERO,
    Blocked,
    Channels,
    Derived,
    Group,
    Info,
    Leaf,
    Member,
    entry,
)
from jaxopt_compress.rewriting.staging import CALLED, Staged, Step
from jaxopt_compress.typing import Value

_LINEAR = {"neg", "abs"}
_SUMS = {"add", "add_any", "sub", "max", "min"}
_SIGNS = {"ge", "gt", "le", "lt", "eq", "ne"}


class Walk:
    """Follows a function's equations once.

    Each value is either not changed by scaling or is divided by one group's scales along one
    axis. Where neither holds, the groups that reach it are blocked, with the reason.

    Attributes:
        groups: All channels found.
        skipped: Weight -> why its output channels have no group at all.
        met: Weight of a product -> the group that it reads; or why it reads none.
    """

    def __init__(
        self,
        staged: Staged,
        leaves: list[jax.ShapeDtypeStruct],
        names: list[str],
        *,
        scans: bool = False,
        scales: bool = False,
    ):
        """``scans``: enter them. ``scales``: what a parameter multiplies begins channels too."""
        self.names = names
        self.groups: list[Group] = []
        self.skipped: dict[int, str] = {}
        self.met: dict[int, int | str] = {}
        self.dtypes = [x.dtype for x in leaves]
        self.used: dict[int, list[str]] = {i: [] for i in range(len(leaves))}
        self._scans, self._scales = scans, scales
        env: dict[int | core.Var, Info] = {
            i: Leaf(i, tuple(range(len(x.shape)))) for i, x in enumerate(leaves)
        }
        self._run(staged.steps, env)
        results = [self._info(x, env) for x in staged.outputs]
        self._block(results, "its result is a result of the function")
        self._use(results, "the function's result")
        for group in self.groups:
            self._settle(group)

    def _run(self, steps: Iterable[Step], env: dict[int | core.Var, Info]) -> None:
        for step in steps:
            infos = [self._info(x, env) for x in step.inputs]
            inside = self._inside(step, infos)
            results = [self._visit(step, infos)] if inside is None else inside
            env.update(zip(step.outputs, results, strict=False))

    def _info(self, atom: Value, env: dict[int | core.Var, Info]) -> Info:
        if isinstance(atom, core.Literal):
            return ZERO if np.all(np.asarray(atom.val) == 0) else Derived(frozenset())
        info = env.get(atom)
        # The scales of a blocked group are 1, so its values do not change.
        reason = isinstance(info, Channels) and self.groups[info.group].reason
        return Blocked(reason) if reason else info

    def _inside(self, step: Step, infos: list[Info]) -> Sequence[Info] | None:
        """The results of a scan, or of a function that one calls; None for other equations."""
        name, params = step.eqn.primitive.name, step.eqn.params
        if not self._scans or (name != "scan" and name not in CALLED):
            return None
        known, line = infos, source_line(step.eqn)
        if name == "scan":
            consts, carry, scanned = scan_split(params, infos)
            once = [*consts, *carry]
            # One value for all iterations, whose channels would need the same scales.
            self._block(infos, f"a scan reads it at {line}")
            self._use(once, line)
            known = [None] * len(once) + [entry(x) for x in scanned]
        body, _ = parts(params["jaxpr" if name == "scan" else CALLED[name]])
        env = dict(zip(body.invars, known, strict=True))
        steps = (Step(eqn, tuple(eqn.invars), tuple(eqn.outvars)) for eqn in body.eqns)
        self._run(steps, env)
        results = [self._info(x, env) for x in body.outvars]
        if name == "scan":
            self._block(results, f"a scan returns it at {line}")
            self._use(results, line)
            return [None] * len(results)
        return results

    def _use(self, infos: list[Info], line: str) -> None:
        for info in infos:
            if isinstance(info, Leaf):
                self.used[info.leaf].append(line)

    def _block(self, infos: list[Info], reason: str) -> None:
        for info in infos:
            if isinstance(info, Channels):
                self.groups[info.group].block(reason)

    def _visit(self, step: Step, infos: list[Info]) -> Info:
        """What the first result of an equation is."""
        out = self._moved(step, infos)
        if out is not None:
            return out
        line = source_line(step.eqn)
        self._use(infos, line)
        if step.eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            out = self._multiply(step, infos, line)
        elif any(isinstance(x, Channels) for x in infos):
            out = self._elementwise(step, infos)
            if isinstance(out, str):
                self._block(infos, f"{out} at {line}")
                out = Blocked(f"{out} at {line}")
        elif all(isinstance(x, Leaf | Derived) or x is ZERO for x in infos):
            leaves = {x.leaf for x in infos if isinstance(x, Leaf)}
            out = Derived(
                frozenset(leaves).union(*(x.leaves for x in infos if isinstance(x, Derived)))
            )
        else:
            out = self._scaled(step, infos)
        self._enclosed(step, infos, line)
        return out

    def _scaled(self, step: Step, infos: list[Info]) -> Info:
        """Data times a parameter that varies along one axis; or with channels that are lost."""
        own = [x for x in infos if isinstance(x, Leaf)]
        if self._scales and step.eqn.primitive.name == "mul" and len(own) == 1:
            shape = step.out.shape
            long = [d for d, k in enumerate(own[0].axes) if k is not None and shape[d] > 1]
            if len(own[0].axes) == len(shape) and len(long) == 1:
                axis = own[0].axes[long[0]]
                writer = Member(own[0].leaf, axis, stack=own[0].stack)  # pyright: ignore
                self.groups.append(Group(shape[long[0]], writer))
                return Channels(len(self.groups) - 1, long[0])
        return next((x for x in infos if isinstance(x, Blocked)), None)

    def _moved(self, step: Step, infos: list[Any]) -> Info:
        """The result's info if the equation only moves axes."""
        if len(infos) != 1:
            return None
        info = infos[0]
        if isinstance(info, Channels):
            same = moved(step)
            axes = same or pooled(step)
            if axes is not None and info.axis in axes:
                plain = info.plain and same is not None
                return info._replace(axis=axes.index(info.axis), plain=plain)
            flat = merged(step, info.axis)
            return flat and info._replace(axis=flat[0], every=flat[1] * info.every)
        axes = moved(step) if isinstance(info, Leaf) or info is ZERO else None
        if axes is None or info is ZERO:
            return None if axes is None else ZERO
        return info._replace(axes=tuple(None if i is None else info.axes[i] for i in axes))

    def _elementwise(self, step: Step, infos: list[Info]) -> Info | str:
        """The channels of the result, None if scales do not change it, or what is wrong."""
        name = step.eqn.primitive.name
        plain = all(x.plain for x in infos if isinstance(x, Channels))
        # All results but sums with biases are other values than the product's.
        infos = [x._replace(plain=False) if isinstance(x, Channels) else x for x in infos]
        data = {x for x in infos if isinstance(x, Channels)}
        first = next(x for x in infos if isinstance(x, Channels))
        if moved(step) is not None or pooled(step) is not None:
            return f"{name} does not keep its axis of channels"
        if name in _LINEAR:
            return first
        if name == "pad" and infos[1] is ZERO:
            if step.eqn.params["padding_config"][first.axis] == (0, 0, 0):
                return first
            return "pad adds channels"
        if name == "sign" or (name in _SIGNS and ZERO in infos):
            return None
        if name == "mul" and sum(isinstance(x, Channels) for x in infos) == 1:
            return first
        if name == "div" and not isinstance(infos[1], Channels):
            return first
        if name == "select_n" and not isinstance(infos[0], Channels):
            rest = infos[1:]
        elif name in _SUMS:
            rest = infos
        else:
            return f"{name} is not positively homogeneous, or reads more than this result"
        if len(data) == 1 and all(x is ZERO or x == first for x in rest):
            return first
        other = next(x for x in rest if x != first and x is not ZERO)
        if name in ("add", "sub", "add_any") and len(data) == 1 and isinstance(other, Leaf):
            axis = other.axes[first.axis]
            if axis is None:
                return f"{self.names[other.leaf]!r} has not one entry per channel and is added"
            group = self.groups[first.group]
            bias = Member(other.leaf, axis, first.every, other.stack)
            group.biases.append(bias)
            if not plain or name == "sub":
                return first
            group.direct.append(bias)
            return first._replace(plain=True)
        return f"{name} joins it with another value"

    def _multiply(self, step: Step, infos: list[Any], line: str) -> Info:
        """Ends the groups of the data and begins that of the result."""
        sides = [i for i, x in enumerate(infos) if isinstance(x, Leaf)]
        made = [x for x in infos if isinstance(x, Derived)]
        found = product(step, sides[0]) if len(sides) == 1 and not made else None
        if found is None:
            self._block(infos, f"it is read by a product without a weight of its own at {line}")
            for leaf in {i for x in made for i in x.leaves} | {infos[i].leaf for i in sides}:
                self.skipped[leaf] = f"it is not the plain weight of a product at {line}"
            return None
        weight, data = infos[sides[0]], infos[found.data]
        if isinstance(data, Channels):
            reason = self._read(found, weight, data)
            if reason:
                self.groups[data.group].block(f"{reason} at {line}")
            self.met.setdefault(weight.leaf, data.group)
        else:
            plain = f"what it meets at {line} is scaled by no parameter, and no product's result"
            self.met.setdefault(weight.leaf, data.reason if isinstance(data, Blocked) else plain)
        axis = None if found.free is None else weight.axes[found.free]
        if axis is None:
            why = f"has not one axis of output channels at {line}"
            self.skipped[weight.leaf] = f"it {why}"
            return Blocked(f"{self.names[weight.leaf]!r}, which makes its input, {why}")
        size = step.out.shape[found.out]
        self.groups.append(Group(size, Member(weight.leaf, axis, stack=weight.stack)))
        return Channels(len(self.groups) - 1, found.out)

    def _read(self, found: Product, weight: Leaf, data: Channels) -> str | None:
        if found.problem:
            return f"the product with {self.names[weight.leaf]!r}, which reads it, {found.problem}"
        at = found.contracted.get(data.axis)
        axis = None if at is None else weight.axes[at]
        if axis is None:
            return f"the product with {self.names[weight.leaf]!r} does not sum over its channels"
        self.groups[data.group].readers.append(Member(weight.leaf, axis, data.every, weight.stack))
        return None

    def _enclosed(self, step: Step, infos: list[Info], line: str) -> None:
        """Weights that only equations inside of ``step`` use."""
        if any(isinstance(v, core.ClosedJaxpr | core.Jaxpr) for v in step.eqn.params.values()):
            for info in infos:
                if isinstance(info, Leaf):
                    name = step.eqn.primitive.name
                    self.skipped[info.leaf] = f"it is used inside of {name} at {line}"

    def _settle(self, group: Group) -> None:
        if not group.readers:
            group.block("no product reads its channels")
        if group.size == 1:
            group.block("it has a single channel")
        for leaf, *_ in (group.writer, *group.biases, *group.readers):
            name, lines = self.names[leaf], self.used[leaf]
            if len(lines) > 1:
                group.block(f"{name!r} is used {len(lines)} times, also at {lines[1]}")
            if not jnp.issubdtype(self.dtypes[leaf], jnp.floating):
                group.block(f"{name!r} holds no real floating-point numbers")
