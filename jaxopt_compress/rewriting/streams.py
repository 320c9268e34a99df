"""Streams of channels that any orthogonal matrix may mix, and the parameters that see them.

A stream is a value along one of its axes. Products write and read streams, sums join them, and
norms by the root of the mean square keep them. Whatever else meets a stream blocks it.
"""

from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxopt_compress.lift._compat import parts, scan_split, source_line
from jaxopt_compress.rewriting.axes import moved, product, shape_of
from jaxopt_compress.rewriting.bases import (
    ZERO,
    Group,
    Info,
    Leaf,
    Met,
    Refused,
    Stream,
    Turn,
    Use,
    Vector,
    as_vector,
    constant,
    entry,
    flat,
    moved_info,
    stacked,
    summed,
)
from jaxopt_compress.rewriting.staging import CALLED, Staged, Step
from jaxopt_compress.typing import Value

_SUMS = {"add", "sub", "add_any"}
_MIXED = "it is joined with a value in a basis of its own"


class Streams:
    """Follows a function's equations once, into scans and the other functions that it calls.

    Attributes:
        groups: All that were found; `find` gives the number of the one that another became.
        uses: Parameter -> the equations that meet it.
        scales: Parameter that multiplies channels -> whether each place is a step of the function.
        turns: Step that multiplies channels in the original basis -> which.
    """

    def __init__(
        self,
        staged: Staged,
        leaves: list[jax.ShapeDtypeStruct],
        turned: frozenset[int] = frozenset(),
    ):
        """``turned`` are parameters that multiply channels in the original basis."""
        self.groups: list[Group] = []
        self._above: list[int] = []
        self._turned = turned
        self._step: int | None = None
        self.uses: dict[int, list[Use]] = {i: [] for i in range(len(leaves))}
        self.scales: dict[int, list[bool]] = {}
        self.turns: dict[int, Turn] = {}
        env: dict[int | core.Var, Info] = {
            i: Leaf(i, tuple(range(len(x.shape)))) for i, x in enumerate(leaves)
        }
        for n, step in enumerate(staged.steps):
            self._step = n
            infos = [self._info(x, env) for x in step.inputs]
            env.update(zip(step.outputs, self._visit(step.eqn, infos), strict=True))
        self._refuse([self._info(x, env) for x in staged.outputs], "it is a result of the function")

    def find(self, group: int) -> int:
        """The group that another one has become."""
        while self._above[group] != group:
            group = self._above[group]
        return group

    def block(self, group: int, reason: str) -> None:
        """Keeps the first reason."""
        own = self.groups[self.find(group)]
        own.reason = own.reason or reason

    def _new(self, size: int) -> int:
        self.groups.append(Group(size))
        self._above.append(len(self._above))
        return len(self._above) - 1

    def _join(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a != b:
            self._above[b] = a
            self.groups[a].reason = self.groups[a].reason or self.groups[b].reason

    def _info(self, atom: Value, env: dict[int | core.Var, Info]) -> Info:
        if isinstance(atom, core.Literal):
            zero = np.all(np.asarray(atom.val) == 0)
            return ZERO if zero else None
        info = env.get(atom)
        # A blocked group keeps its basis, so that its values do not change.
        blocked = isinstance(info, Stream) and self.groups[self.find(info.group)].reason
        return None if blocked else info

    def _refuse(self, infos: list[Info], reason: str) -> None:
        for info in infos:
            if isinstance(info, Stream):
                self.block(info.group, reason)
            self._use(info, (), reason)

    def _use(self, info: Info, met: tuple[Met, ...], line: str) -> None:
        if isinstance(info, Leaf | Vector):
            self.uses[info.leaf].append(Use(met, line))

    def _visit(self, eqn: core.JaxprEqn, infos: list[Info]) -> list[Info]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, infos)
        if name in CALLED:
            return self._inside(eqn.params[CALLED[name]], infos)
        try:
            out = self._equation(Step(eqn, (), ()), infos, source_line(eqn))
        except Refused as refused:
            self._refuse(infos, f"{refused} at {source_line(eqn)}")
            out = None
        return [out] + [None] * (len(eqn.outvars) - 1)

    def _inside(self, jaxpr: core.Jaxpr | core.ClosedJaxpr, infos: list[Info]) -> list[Info]:
        body, _ = parts(jaxpr)
        env: dict[int | core.Var, Info] = dict(zip(body.invars, infos, strict=True))
        step, self._step = self._step, None
        for eqn in body.eqns:
            given = [self._info(x, env) for x in eqn.invars]
            env.update(zip(eqn.outvars, self._visit(eqn, given), strict=True))
        self._step = step
        return [self._info(x, env) for x in body.outvars]

    def _scan(self, eqn: core.JaxprEqn, infos: list[Info]) -> list[Info]:
        """The body, once: each carry is in one basis before and after."""
        consts, carry, _ = scan_split(eqn.params, infos)
        first, behind = len(consts), len(consts) + len(carry)
        known = [*infos[:first], *infos[first:behind], *map(entry, infos[behind:])]
        for i, (info, own) in enumerate(zip(infos, known, strict=True)):
            plain = isinstance(own, Stream) and own.scale is None and not own.square
            if (first <= i < behind and not plain) or (own is None and info is not None):
                self._refuse([info], "a scan carries it, or runs over it")
                known[i] = None
        results = self._inside(eqn.params["jaxpr"], known)
        out = [
            self._carried(pair)
            for pair in zip(known[first:behind], results[: behind - first], strict=True)
        ]
        return [*out, *map(stacked, results[behind - first :])]

    def _carried(self, pair: tuple[Any, Any]) -> Info:
        if all(isinstance(x, Stream) for x in pair) and pair[0][1:] == pair[1][1:]:
            self._join(pair[0].group, pair[1].group)
            return pair[0]
        self._refuse(list(pair), "a scan carries it together with another value")
        return None

    def _equation(self, step: Step, infos: list[Info], line: str) -> Info:
        """The info of the result; raises `Refused` where a parameter or stream is lost."""
        name = step.eqn.primitive.name
        axes = moved(step) if len(infos) == 1 else None
        if axes is not None:
            return moved_info(infos[0], axes, step)
        if name in ("dot_general", "conv_general_dilated"):
            return self._multiply(step, infos, line)
        if name == "gather" and isinstance(infos[0], Leaf):
            return self._lookup(step, infos[0], line)
        if name in ("mul", "div"):
            return self._scaled(step, infos, line)
        data = [x for x in infos if isinstance(x, Stream)]
        if not data:
            if any(isinstance(x, Leaf | Vector) for x in infos):
                raise Refused(f"{name} meets it")
            return flat(step, infos)
        first = data[0]
        whole = step.out.shape[first.axis : first.axis + 1] == (self.groups[first.group].size,)
        if name == "square" or (name == "integer_pow" and step.eqn.params["y"] == 2):
            if first.scale is None and not first.square:
                return first._replace(square=True)
        elif name == "neg":
            return first
        elif name == "reduce_sum":
            return summed(first, step)
        elif name in _SUMS:
            return self._together(infos, line)
        elif name == "select_n" and first.axis in constant(step, infos, 0):
            return self._together(infos[1:], line)
        elif name == "concatenate" and step.eqn.params["dimension"] != first.axis:
            return self._together(infos, line)
        elif name in ("slice", "dynamic_slice") and infos[0] is first and whole:
            return first
        raise Refused(f"{name} is no operation that a rotation of channels passes through,")

    def _together(self, infos: list[Info], line: str) -> Stream:
        """One stream of several, and of parameters beside them, such as biases."""
        first = next(x for x in infos if isinstance(x, Stream))
        for x in infos:
            axis = x.axes[first.axis] if isinstance(x, Leaf) else None
            same = isinstance(x, Stream) and x[1:] == first[1:]
            if (
                first.square
                or first.scale is not None
                or not (same or x is ZERO or axis is not None)
            ):
                raise Refused(_MIXED)
        for x in infos:
            if isinstance(x, Stream):
                self._join(first.group, x.group)
            elif isinstance(x, Leaf):
                self._use(x, (Met(x.axes[first.axis], first.group),), line)  # pyright: ignore
        return first

    def _scaled(self, step: Step, infos: list[Any], line: str) -> Info:
        """Products with what is the same for all channels, with a scale per channel, or itself."""
        name = step.eqn.primitive.name
        data = [i for i, x in enumerate(infos) if isinstance(x, Stream)]
        if not data:
            return self._vector(step, infos)
        stream = infos[data[0]]
        if len(data) == 2 and name == "mul" and step.eqn.invars[0] is step.eqn.invars[1]:
            if stream.scale is None and not stream.square:
                return stream._replace(square=True)
        if len(data) != 1 or (name == "div" and data != [0]):
            raise Refused("it is multiplied by another value that depends on data")
        k = 1 - data[0]
        if stream.axis in constant(step, infos, k) and not isinstance(infos[k], Leaf | Vector):
            return stream
        vector = as_vector(infos[k], shape_of(step, k))
        fits = vector is not None and vector.at == stream.axis and name == "mul"
        if vector is None or not fits or stream.scale is not None or stream.square:
            raise Refused("its channels are scaled by what is not one parameter")
        leaf = vector.leaf
        if leaf in self._turned:
            if self._step is None:
                raise Refused(f"{name} would have to be done in the original basis")
            self.turns[self._step] = Turn(stream.group, stream.axis)
            self._use(vector, (), line)
            return stream
        self.scales.setdefault(leaf, []).append(self._step is not None)
        self._use(vector, (Met(vector.axis, stream.group, leaf),), line)
        return stream._replace(scale=leaf)

    def _vector(self, step: Step, infos: list[Info]) -> Info:
        """A parameter times what is the same for all of its channels."""
        own = [i for i, x in enumerate(infos) if isinstance(x, Leaf | Vector)]
        if not own:
            return flat(step, infos)
        k = own[0]
        vector = as_vector(infos[k], shape_of(step, k))
        one = len(own) == 1 and step.eqn.primitive.name == "mul"
        if not one or vector is None or vector.at not in constant(step, infos, 1 - k):
            raise Refused(f"{step.eqn.primitive.name} meets it")
        return vector

    def _multiply(self, step: Step, infos: list[Any], line: str) -> Stream | None:
        """Reads the stream of the data and begins that of the result."""
        sides = [i for i, x in enumerate(infos) if isinstance(x, Leaf)]
        found = product(step, sides[0]) if len(sides) == 1 else None
        if found is None or any(isinstance(x, Vector) for x in infos):
            if any(isinstance(x, Leaf | Vector | Stream) for x in infos):
                raise Refused("it meets a product without a weight of its own")
            return None
        weight, data = infos[sides[0]], infos[found.data]
        met, out = [], None
        if isinstance(data, Stream):
            at = found.contracted.get(data.axis)
            axis = None if at is None or found.problem or data.square else weight.axes[at]
            if axis is None:
                raise Refused("it meets a product that does not sum over its channels")
            met.append(Met(axis, data.group, data.scale))
        axis = None if found.free is None or found.problem else weight.axes[found.free]
        if axis is not None:
            out = Stream(self._new(step.out.shape[found.out]), found.out)
            met.append(Met(axis, out.group))
        self._use(weight, tuple(met), line)
        return out

    def _lookup(self, step: Step, table: Leaf, line: str) -> Stream:
        """Rows of a table begin a stream."""
        spec, sizes = step.eqn.params["dimension_numbers"], step.eqn.params["slice_sizes"]
        shape = shape_of(step, 0)
        gone = (*spec.collapsed_slice_dims, *spec.operand_batching_dims)
        kept = [d for d in range(len(shape)) if d not in gone]
        pairs = zip(spec.offset_dims, kept, strict=True)
        whole = [(at, d) for at, d in pairs if sizes[d] == shape[d] > 1]
        if len(whole) != 1 or table.axes[whole[0][1]] is None:
            raise Refused("gather meets it")
        at, d = whole[0]
        out = Stream(self._new(shape[d]), at)
        self._use(table, (Met(table.axes[d], out.group),), line)  # pyright: ignore
        return out
