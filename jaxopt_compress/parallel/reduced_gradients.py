"""Averaging gradients over devices in fewer bytes, as an optax transformation."""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.compression.parameter import Parameter
from jaxopt_compress.lift import Uses, layout_of
from jaxopt_compress.parallel.blockwise import blockwise
from jaxopt_compress.parallel.reduction import AxisName, Reduction, Shape, is_checked, varies
from jaxopt_compress.tree import Where, assume_layout, fit_of, map_named, named_leaves
from jaxopt_compress.tree.layout import warn_assumed
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree


class ReducedState(NamedTuple):
    """The state of `reduced_gradients`.

    Attributes:
        residual: Path -> float32 ``[devices, *shape]``: what each device has not sent yet. Inside
            of `jax.shard_map` the first axis is 1.
        shared: Path -> what the method remembers, the same on all devices.
    """

    residual: dict[str, jax.Array]
    shared: dict[str, Any]


def reduced_gradients(
    method: str | Reduction,
    axis_name: AxisName,
    *,
    devices: int | None = None,
    where: Where = None,
    min_size: int = 4096,
    uses: Uses | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Averages gradients over the devices of a mesh axis, in fewer bytes, with error feedback.

    Takes the place of ``jax.lax.pmean(grads, axis_name)`` before an optimizer, inside of
    `jax.shard_map` or `jax.pmap`. What a device could not send, it keeps and adds to its next
    gradient, so that sums over steps stay those of the gradients:

    .. math:: \sum_t \bar g_t + \frac 1 D \sum_i e_i = \frac 1 D \sum_t \sum_i g_{i, t}

    The averages are the same on all devices, bit for bit. After a gradient that is not finite, what
    is returned is not finite either, and the state stays as it was: put `optax.apply_if_finite`
    around the optimizer behind this one.

    Gradients have to be those of each device's own batch. Where `jax.shard_map` checks what differs
    between devices (``check_vma=True``, its default), derivatives at parameters that are the same
    on all of them have been summed already, in float32: take them at
    ``jax.lax.pcast(params, axis_name, to="varying")``. Anything else is refused.

    Args:
        method: `power_sgd`, `top_k`, `blockwise`; or the name of a format, ``"int8"`` for
            ``blockwise("int8")``, and ``"float32"`` for plain averages without a state.
        axis_name: The name of the mesh axis, or a tuple of names.
        devices: Their number along the axis. Needed by ``init`` where neither the axis is bound,
            as in `jax.shard_map` and `jax.pmap`, nor a mesh is set by `jax.set_mesh`.
        where: Which parameters, by path or predicate; by default all floating ones of ``min_size``
            entries and more. What is not taken, by this or by the method, is averaged plainly.
        min_size: Entries below which a parameter is averaged plainly.
        uses: What `uses` found, so that stacks and matrices follow the function.
        seed: The seed of the factors that `power_sgd` starts from.

    Returns:
        An optax transformation. Its state holds a residual per device: see `reduced_specs`.

    Raises:
        ValueError: In ``init``: the number of devices is unknown, or nothing is taken. In
            ``update``: gradients that have been summed, or a state of other parameters.
        TypeError: In ``update``: gradients that hold more than one array per parameter.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxopt_compress as jc
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        >>> reduced = jc.reduced_gradients(jc.power_sgd(rank=4), axis_name="data", devices=1)
        >>> tx = optax.chain(reduced, optax.adam(1e-3))
        >>> params, x = {"w": jnp.ones((256, 64))}, jnp.ones((8, 256))
        >>> opt_state = tx.init(params)
        >>> def step(params, opt_state, x):
        ...     own = jax.lax.pcast(params, "data", to="varying")
        ...     grads = jax.grad(lambda params: jnp.mean((x @ params["w"]) ** 2))(own)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> specs = P(), jc.reduced_specs(opt_state, "data")
        >>> step = jax.jit(
        ...     jax.shard_map(step, mesh=mesh, in_specs=(*specs, P("data")), out_specs=specs)
        ... )
        >>> params, opt_state = step(params, opt_state, x)
        >>> opt_state[0].residual["w"].shape, opt_state[0].shared["w"].shape
        ((1, 256, 64), (1, 64, 4))
    """
    reduction = _named(method) if isinstance(method, str) else method

    def init(params: PyTree) -> ReducedState:
        if reduction is _PLAIN:
            return ReducedState({}, {})
        taken = _taken(reduction, params, where, min_size, uses)
        count, key = _devices(axis_name, devices), jax.random.key(seed)
        shared = {
            path: reduction.init(
                _matrices(p), jax.random.fold_in(key, zlib.crc32(path.encode()) >> 1)
            )
            for path, p in taken.items()
        }
        residual = {p: jnp.zeros((count, *x.value.shape), jnp.float32) for p, x in taken.items()}
        return ReducedState(residual, shared)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[Any, Any]:
        del params
        _check_gradients(updates, state, axis_name)
        residual, shared = dict(state.residual), dict(state.shared)

        def one(path: str, g: jax.Array) -> jax.Array:
            if path not in state.residual:
                return lax.pmean(g, axis_name)
            parameter = _parameter(path, g, uses)
            whole = g.astype(jnp.float32) + state.residual[path][0]
            m = parameter.matrix(whole).reshape(_matrices(parameter))
            average, share, shared[path] = reduction.mean(m, state.shared[path], axis_name)
            residual[path] = (whole - parameter.from_matrix(share))[None]
            return parameter.from_matrix(average).astype(g.dtype)

        averages = map_named(one, updates)
        taken = [x for path, x in named_leaves(averages) if path in state.residual]
        finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in taken]))
        new = ReducedState(residual, shared)
        return averages, jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)

    return optax.GradientTransformation(init, update)


def reduced_specs(opt_state: PyTree, axis_name: AxisName) -> Any:
    """Partition specs of an optimizer's state for `jax.shard_map`.

    Args:
        opt_state: A state that holds that of `reduced_gradients` somewhere, or its abstract form.
        axis_name: As there.

    Returns:
        A tree of the structure of ``opt_state``: the axis for residuals, which each device has its
        own of, and an empty spec for everything else.
    """
    mine = lambda x: isinstance(x, ReducedState)

    def specs(x: Leaf) -> Any:
        if not mine(x):
            return PartitionSpec()
        own = jax.tree.map(lambda _: PartitionSpec(axis_name), x.residual)
        return ReducedState(own, jax.tree.map(lambda _: PartitionSpec(), x.shared))

    return jax.tree.map(specs, opt_state, is_leaf=mine)


_PLAIN = Reduction("float32", lambda shape: False, lambda *_: None, lambda m, q, _: (m, m, q))


def _named(method: str) -> Reduction:
    return _PLAIN if method == "float32" else blockwise(method)


def _taken(
    reduction: Reduction, params: PyTree, where: Where, min_size: int, uses: Uses | None
) -> dict[str, Parameter]:
    """The parameters whose gradients are sent in fewer bytes.

    Raises:
        ValueError: There are none.
    """
    taken, assumed = {}, []
    for path, leaf in named_leaves(params):
        chosen = is_float(leaf) and leaf.size >= min_size and not is_compressed(leaf)
        if not chosen or not (where is None or fit_of(where, path, leaf)):
            continue
        parameter = _parameter(path, leaf, uses)
        if reduction.takes(_matrices(parameter)):
            taken[path] = parameter
            assumed += [path] if leaf.ndim > 2 and not (uses or {}).get(path) else []
    if not taken:
        raise ValueError(
            f"reduced_gradients: {reduction.name} takes none of "
            f"{', '.join(f'{p} {tuple(x.shape)}' for p, x in named_leaves(params))}: they are "
            f"small (min_size={min_size}), not chosen by where={where!r}, or would take no fewer "
            "bytes"
        )
    warn_assumed(assumed, where)
    return taken


def _parameter(path: str, leaf: Leaf, uses: Uses | None) -> Parameter:
    """With the roles of its axes; the value only has a shape."""
    shape = tuple(leaf.shape)
    layout = layout_of(uses[path]) if uses is not None and path in uses else None
    value: Leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return Parameter(path, value, layout or assume_layout(shape))


def _matrices(parameter: Parameter) -> Shape:
    """``[layers, k, n]``."""
    shape = jax.eval_shape(parameter.matrix, parameter.value).shape
    return (math.prod(shape[:-2]), *shape[-2:])


def _devices(axis_name: AxisName, devices: int | None) -> int:
    """How many residuals a state holds: one where the axis is bound, one per device elsewhere."""
    try:
        lax.axis_size(axis_name)
        return 1
    except NameError:
        pass
    if devices is not None:
        return devices
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    sizes = jax.sharding.get_abstract_mesh().shape
    if not set(names) <= set(sizes):
        raise ValueError(
            f"reduced_gradients: init does not know how many devices there are along {axis_name!r}"
            ": pass devices=, set a mesh by jax.set_mesh, or call it inside of jax.shard_map"
        )
    return math.prod(sizes[name] for name in names)


def _check_gradients(updates: PyTree, state: ReducedState, axis_name: AxisName) -> None:
    leaves = dict(named_leaves(updates))
    missing = [path for path in state.residual if path not in leaves]
    if missing:
        raise ValueError(
            f"reduced_gradients: there is a residual of {missing[0]!r}, and no gradient: the state "
            "is that of other parameters"
        )
    for path, g in leaves.items():
        if is_compressed(g):
            raise TypeError(
                f"reduced_gradients: the gradient of {path!r} is a {type(g).__name__}: pass "
                "jaxopt_compress.weight_gradients(grads), which is one array per parameter"
            )
        kept = state.residual.get(path)
        if kept is not None and kept.shape != (1, *g.shape):
            raise ValueError(
                f"reduced_gradients: the residual of {path!r} has shape {kept.shape}, and its "
                f"gradient {g.shape}; a device takes the one of its own, (1, *shape): split the "
                "state by reduced_specs(opt_state, axis_name)"
            )
    if is_checked(axis_name):
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        apart = lambda g: all(varies(g, name) for name in names)
        summed = [path for path, g in leaves.items() if not apart(g)]
        if summed:
            raise ValueError(
                f"reduced_gradients: the gradient of {summed[0]!r} is the same on all devices of "
                f"{axis_name!r}, or of one of these axes: it has been summed already. Take "
                f"gradients at jax.lax.pcast(params, {axis_name!r}, to='varying')"
            )
