"""Every place where versions of JAX differ, or where more than its public API is needed."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util
from jax.typing import DTypeLike

from jaxopt_compress.typing import PyTree, Value


def parts(jaxpr: Any) -> tuple[Any, Sequence[Value]]:
    """The open jaxpr and its constants; newer versions know one kind of jaxpr only."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def close(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.ClosedJaxpr:
    """A closed jaxpr from an open one without constants."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, [])


@contextlib.contextmanager
def equation_scope(eqn: core.JaxprEqn) -> Iterator[None]:
    """Binds under the name stack, the traceback and the configuration of ``eqn``."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=names),
        eqn.ctx.manager,
    ):
        yield


def bind(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Binds the primitive of ``eqn`` to other operands, all else unchanged."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def type_of(v: Value) -> Any:
    """The type of a variable or literal of a jaxpr, with a shape and a dtype."""
    return v.aval


def source_line(eqn: core.JaxprEqn) -> str:
    """``file:line (function)`` of the user's code that made ``eqn``."""
    return source_info_util.summarize(eqn.source_info)


def dense_type(leaf: Value) -> jax.ShapeDtypeStruct:
    """The type of a compressed array's dense form, on the mesh that its fields are on."""
    kinds = [jax.typeof(x) for x in jax.tree.leaves(leaf)]
    if any(entry is not None for kind in kinds for entry in kind.sharding.spec):
        return jax.eval_shape(lambda x: x.materialize(), leaf)
    return varying_type(leaf.shape, leaf.dtype, kinds)


def varying_type(
    shape: tuple[int, ...], dtype: DTypeLike, kinds: Sequence[Value]
) -> jax.ShapeDtypeStruct:
    """The type of an array that varies over a manual mesh as any of some types does."""
    every = frozenset().union(*(kind.manual_axis_type.varying for kind in kinds))
    if not every:
        return jax.ShapeDtypeStruct(shape, dtype)
    manual = type(kinds[0].manual_axis_type)(varying=every)
    whole = jax.sharding.NamedSharding(kinds[0].sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole, manual_axis_type=manual)


def explicit_sharding(x: Value) -> jax.sharding.NamedSharding | None:
    """The sharding that the type of an array, tracer or type names; None without one."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else None
    named = sharding is not None and any(entry is not None for entry in sharding.spec)
    return sharding if named else None


def call_origin(jaxpr: core.Jaxpr) -> core.DebugInfo | None:
    """The origin to name for calls made from parts of ``jaxpr``.

    None where operations are run one by one rather than staged: a call would be compiled each time.
    """
    if not core.unsafe_am_i_under_a_jit_DO_NOT_USE():  # pyright: ignore
        return None
    return part_origin(jaxpr)


def part_origin(jaxpr: core.Jaxpr) -> core.DebugInfo:
    """The origin to name for a part of ``jaxpr`` that has other arguments."""
    return jaxpr.debug_info._replace(arg_names=None, result_paths=None)


@functools.cache
def _call_template(mesh: jax.sharding.AbstractMesh) -> tuple[core.Primitive, dict[str, PyTree]]:
    """The primitive and the parameters of a `jax.jit` call, as JAX itself makes them."""
    del mesh  # the current one, which the parameters name
    eqn = jax.make_jaxpr(jax.jit(lambda x: x))(0.0).jaxpr.eqns[0]
    return eqn.primitive, dict(eqn.params)


def bind_call(closed: core.ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
    """Binds a jaxpr as one call, without tracing it again."""
    primitive, template = _call_template(jax.sharding.get_abstract_mesh())
    n, m = len(values), len(closed.jaxpr.outvars)
    params = {
        **template,
        "jaxpr": closed,
        "name": "replay",
        "donated_invars": (False,) * n,
        "in_shardings": template["in_shardings"] * n,
        "in_layouts": template["in_layouts"] * n,
        "out_shardings": template["out_shardings"] * m,
        "out_layouts": template["out_layouts"] * m,
    }
    return primitive.bind(*values, **params)


def scan_split(params: dict[str, PyTree], operands: list[Value]) -> tuple[list, list, list]:
    """The operands of a scan: constants, carry, scanned."""
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        groups = params["ft_in"].update(operands).unpack()
        consts, carry = (len(list(group.vals)) for group in groups[:2])
    cut = consts + carry
    return operands[:consts], operands[consts:cut], operands[cut:]


def manual_axes(params: dict[str, PyTree]) -> set[str]:
    """The mesh axes that a shard_map equation makes manual."""
    axes = params.get("newly_manual_axes", params.get("manual_axes"))
    return set(params["mesh"].axis_names if axes is None else axes)
