"""Shared by rules for products: how a weight meets an activation, and a weight as an operand."""

import functools
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jaxopt_compress.arrays import (
    CodebookArray,
    FakeQuantizedArray,
    QuantizedArray,
    SparseArray,
    materialize,
)
from jaxopt_compress.lift.interpreter import Call, Layer, Ref, leaf_rule
from jaxopt_compress.lift.views import NoView
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.typing import Value

Rule = Callable[[Call, int, Sequence[Value]], Value]


def contraction_rule(primitives: str, *types: type) -> Callable[[Rule], Rule]:
    """As `leaf_rule`, for ``rule(call, at, values)`` with all operands dense but the one at ``at``.

    Where mesh axes are explicit, types name shardings, and an equation says how its result is
    split. The stored form takes other equations: the compiler splits those, and the result is split
    as staged.

    A scan keeps what its backward pass reads for all layers at once. That is the stored form here,
    decoded anew, or all weights would be in memory as they were before compression.
    """

    def register(rule: Rule) -> Rule:
        @leaf_rule(primitives, *types)
        def _(call: Call, at: int) -> Value:
            sharding = call.out.sharding
            explicit = AxisType.Explicit in sharding.mesh.axis_types
            scanned = _kept_for_all_layers(call)
            if not explicit and not scanned:
                return rule(call, at, call.others(at))
            if explicit:
                alone = [x.alone() if isinstance(x, Ref) else x for x in call.operands]
                call = call._replace(operands=alone)

            def run(*values: Value) -> jax.Array:
                y = rule(call, at, values)
                if y is NotImplemented:
                    raise NoView
                return y

            stored: Callable[..., Value] = run
            if explicit:
                stored = jax.sharding.auto_axes(stored, out_sharding=sharding)
            if scanned:
                stored = jax.checkpoint(stored, prevent_cse=False)
            try:
                return stored(*call.others(at))
            except NoView:
                return NotImplemented

        return rule

    return register


def _kept_for_all_layers(call: Call) -> bool:
    """Whether the equation is part of a scan, and no `jax.checkpoint` in it says what to keep."""
    for eqn in reversed(call.replay.enclosing):
        if eqn.primitive.name in ("scan", "remat2", "checkpoint"):
            return eqn.primitive.name == "scan"
    return False


class Product(NamedTuple):
    """A product of an activation and a weight, the weight second.

    Attributes:
        contract: ``(axes of the activation, axes of the weight)`` that are summed over.
        batch: ``(axes of the activation, axes of the weight)`` that are kept in step.
        dtype: The dtype of the result.
        precision: As in `jax.lax.dot_general`.
        pallas: Whether it may run in a kernel, as `lift` says.
        place: Where a scanned stack holds the fields of the weight, or None.
    """

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: DTypeLike
    precision: lax.PrecisionLike = None
    pallas: bool = False
    place: "Place | None" = None


class Place(NamedTuple):
    """The stack that holds the fields of a weight, for kernels that read them there.

    Attributes:
        weight: One layer of a stack.
        layer: Which one, and the stack.
    """

    weight: Value
    layer: Layer

    def stack_of(self, field: jax.Array) -> jax.Array | None:
        """The stack that a field was cut from, unless something has been done to it since."""
        fields, stacks = jax.tree.leaves(self.weight), jax.tree.leaves(self.layer.stack)
        pairs = zip(fields, stacks, strict=True)
        return next((stack for own, stack in pairs if own is field), None)


def axis_names(x_ndim: int, w_ndim: int, how: Product) -> tuple[str, str, str]:
    """A letter for each axis of the activation, the weight and the result, as of an einsum."""
    letters = iter(string.ascii_letters)
    x, w = {}, {}
    pairs = [*zip(*how.batch, strict=True), *zip(*how.contract, strict=True)]
    for own, other in pairs:
        x[own] = w[other] = next(letters)
    batch = [x[d] for d in how.batch[0]]
    rows = [x.setdefault(d, next(letters)) for d in range(x_ndim) if d not in x]
    columns = [w.setdefault(d, next(letters)) for d in range(w_ndim) if d not in w]
    join = lambda names, ndim: "".join(names[d] for d in range(ndim))
    return join(x, x_ndim), join(w, w_ndim), "".join((*batch, *rows, *columns))


def aligned(field: jax.Array, names: str, to: str) -> jax.Array:
    """A field broadcast against the axes ``to``; along other axes its size is 1."""
    field = jnp.squeeze(field, [i for i, name in enumerate(names) if name not in to])
    kept = [name for name in names if name in to]
    field = jnp.transpose(field, [kept.index(name) for name in to if name in kept])
    return jnp.expand_dims(field, [i for i, name in enumerate(to) if name not in kept])


@functools.singledispatch
def contract(w: Value, x: jax.Array, how: Product) -> Value:
    """``[*batch, *free axes of x, *free axes of w]``, or NotImplemented.

    Each kind of weight registers its own.
    """
    return dot(x, w.astype(x.dtype), how)


@contract.register
def _contract_sparse(w: SparseArray, x: jax.Array, how: Product) -> jax.Array:
    return dot(x, w.materialize().astype(x.dtype), how)


@contract.register
def _contract_codebook(w: CodebookArray, x: jax.Array, how: Product) -> jax.Array:
    """Values are looked up where they are used; few ones are selected, which products fuse."""
    return dot(x, w.materialize().astype(x.dtype), how)


def dot(x: jax.Array, w: jax.Array, how: Product, preferred: DTypeLike | None = None) -> jax.Array:
    """The product with a dense weight."""
    return lax.dot_general(x, w, (how.contract, how.batch), how.precision, preferred or how.dtype)


def short_sums(dtype: DTypeLike) -> Value:
    """The type that accelerators may round sums to before steps multiply them; None for float32.

    That of the result, unless sums of codes outgrow its range.
    """
    return dtype if dtype == jnp.bfloat16 else None


def levels(w: QuantizedArray, dtype: DTypeLike) -> jax.Array:
    """``level(codes) - zero`` in a floating dtype: float32 with zero points, else ``dtype``."""
    if w.zero is not None or not isinstance(w.fmt.grid, Integers):
        return w.levels() if w.zero is not None else w.levels().astype(dtype)
    # By way of float32: a TPU without arithmetic in shorter floats converts faster.
    return w.unpacked().astype(promoted(dtype, jnp.float32)).astype(dtype)


def dense_operand(w: Value, dtype: DTypeLike) -> jax.Array:
    """The dense weight as elementwise work that a consumer may fuse: not sealed off."""
    if isinstance(w, FakeQuantizedArray):
        return w.moving(dense_operand(w.nearest(), dtype))
    if isinstance(w, QuantizedArray):
        scaled = w.levels() * w.per_entry(w.steps())
        return scaled.astype(w.dtype).astype(dtype)
    return materialize(w).astype(dtype)
