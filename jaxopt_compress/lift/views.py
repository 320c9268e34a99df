"""Operations that only look at a compressed array from another side.

Each returns the same kind of array with its fields permuted, cut or relabelled, or NotImplemented
where the stored form has no such view.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import CompressedArray, LowRankArray, QuantizedArray, SparseArray
from jaxopt_compress.lift.interpreter import Call, Ref, leaf_rule

STORED = (QuantizedArray, SparseArray, LowRankArray)


def entrywise(q: QuantizedArray) -> QuantizedArray:
    """The same array with one plain code per entry, for views that words or masks do not have."""
    if q.block is None and not isinstance(q.codes, SparseArray):
        return q
    codes = q.integers()
    if isinstance(q.codes, SparseArray) and q.zero is not None:
        zero = q.per_entry(q.zero)
        codes = jnp.where(q.codes.mask(), codes, jnp.broadcast_to(zero, codes.shape))
    return q.replace(codes=codes, block=None)


def map_fields(q: QuantizedArray, fn: Any, **meta: Any) -> QuantizedArray:
    """Applies ``fn`` to codes, scale and zero point."""
    zero = None if q.zero is None else fn(q.zero)
    return q.replace(codes=fn(q.codes), scale=fn(q.scale), zero=zero, **meta)


@leaf_rule("convert_element_type", *STORED)
def _convert(call: Call, at: int) -> Any:
    array, dtype = call.operands[at].array, call.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    if isinstance(array, SparseArray):
        return array.replace(values=array.values.astype(dtype))
    return array.replace(dtype=jnp.dtype(dtype))


@leaf_rule("copy copy_p stop_gradient optimization_barrier pvary pcast", *STORED)
def _as_is(call: Call, at: int) -> Any:
    if len(call.operands) > 1:
        return [x.array if isinstance(x, Ref) else x for x in call.operands]
    if call.eqn.primitive.name == "stop_gradient":
        stop = lambda x: lax.stop_gradient(x)
        return jax.tree.map(stop, call.operands[at].array)
    return call.operands[at].array


@leaf_rule("name", *STORED)
def _name(call: Call, at: int) -> Any:
    return call.operands[at].array


@leaf_rule("sharding_constraint reshard", *STORED)
def _constrain(call: Call, at: int) -> Any:
    array = call.operands[at].array
    sharding = call.params.get("sharding", call.params.get("dst_sharding"))
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return array
    place = lambda spec, x: lax.with_sharding_constraint(
        x, jax.sharding.NamedSharding(sharding.mesh, spec)
    )
    is_spec = lambda s: isinstance(s, jax.sharding.PartitionSpec)
    return jax.tree.map(place, array.specs(sharding.spec), array, is_leaf=is_spec)


@leaf_rule("transpose", QuantizedArray)
def _transpose_quantized(call: Call, at: int) -> Any:
    array, order = call.operands[at].array, call.params["permutation"]
    if isinstance(array.codes, SparseArray):
        array = entrywise(array)
    axis = array.axis
    if axis is not None:
        axis = order.index(array.ndim + array.checked_axis) - array.ndim
    return map_fields(array, lambda x: jnp.transpose(x, order), axis=axis)


@leaf_rule("transpose", LowRankArray)
def _transpose_low_rank(call: Call, at: int) -> Any:
    """Swaps the two sides, where the permutation does just that."""
    array, order = call.operands[at].array, call.params["permutation"]
    swap = (*range(array.ndim - 2), array.ndim - 1, array.ndim - 2)
    if tuple(order) == tuple(range(array.ndim)):
        return array
    if array.out_ndim != 1 or tuple(order) != swap or array.ndim < 2:
        return NotImplemented
    u, v = _swapped(array.v), _swapped(array.u)
    return NotImplemented if u is None or v is None else array.replace(u=u, v=v)


def _swapped(x: Any) -> Any:
    if not isinstance(x, CompressedArray):
        return jnp.swapaxes(x, -1, -2)
    if not isinstance(x, QuantizedArray):
        return None
    x = entrywise(x) if isinstance(x.codes, SparseArray) else x
    axis = {-1: -2, -2: -1}.get(x.checked_axis, x.axis)
    return map_fields(x, lambda a: jnp.swapaxes(a, -1, -2), axis=axis)


@leaf_rule("transpose reshape broadcast_in_dim slice dynamic_slice squeeze rev", SparseArray)
def _view_sparse(call: Call, at: int) -> Any:
    """Views of a sparse array are taken of the dense one, as its products are."""
    array = call.operands[at].array
    stacked = _leading(call, at, array)
    if stacked is not NotImplemented:
        return stacked
    return _bind_on(call, at, array.materialize())


def _bind_on(call: Call, at: int, value: Any) -> Any:
    operands = call.dense(at)
    operands[at] = value
    return call.eqn.primitive.bind(*operands, **call.params)


@leaf_rule("slice dynamic_slice squeeze", LowRankArray)
def _view_low_rank(call: Call, at: int) -> Any:
    return _leading(call, at, call.operands[at].array)


def _leading(call: Call, at: int, array: Any) -> Any:
    """A slice or a squeeze of stack axes alone, which all fields share."""
    name, params = call.eqn.primitive.name, call.params
    core = array.ndim - len(array.core) if isinstance(array, SparseArray) else None
    if core is None:
        inner = array.axis if isinstance(array, SparseArray) else -array.out_ndim - 1
        core = array.ndim + inner if inner is not None else 0
        if isinstance(array, LowRankArray):
            core = next((i for i in range(core) if array.u.shape[i] != array.v.shape[i]), core)
    if name == "squeeze":
        dims = params["dimensions"]
        squeeze = lambda x: lax.squeeze(x, dims)
        return jax.tree.map(squeeze, array) if all(d < core for d in dims) else NotImplemented
    if name == "slice":
        starts, limits, strides = (
            params["start_indices"],
            params["limit_indices"],
            params["strides"] or (1,) * array.ndim,
        )
        whole = all(
            starts[i] == 0 and limits[i] == array.shape[i] and strides[i] == 1
            for i in range(core, array.ndim)
        )
        cut = lambda x: lax.slice(
            x,
            (*starts[:core], *(0,) * (x.ndim - core)),
            (*limits[:core], *x.shape[core:]),
            (*strides[:core], *(1,) * (x.ndim - core)),
        )
        return jax.tree.map(cut, array) if whole and core else NotImplemented
    if name == "dynamic_slice" and core:
        sizes = params["slice_sizes"]
        if tuple(sizes[core:]) != tuple(array.shape[core:]):
            return NotImplemented
        starts = list(call.dense(at)[1 : 1 + core])
        cut = lambda x: lax.dynamic_slice(
            x, [*starts, *(0,) * (x.ndim - core)], (*sizes[:core], *x.shape[core:])
        )
        return jax.tree.map(cut, array)
    return NotImplemented


@leaf_rule("slice dynamic_slice squeeze rev", QuantizedArray)
def _cut_quantized(call: Call, at: int) -> Any:
    """Cuts every field along an axis that it has in full; grouped axes cannot be cut."""
    array, name, params = call.operands[at].array, call.eqn.primitive.name, call.params
    array = entrywise(array) if isinstance(array.codes, SparseArray) else array
    ndim = array.ndim
    bound = array.group is not None or array.block is not None
    fixed = ndim + array.checked_axis if bound else None
    axis = array.axis
    if name == "squeeze":
        dims = params["dimensions"]
        if axis is not None:
            if ndim + axis in dims and bound:
                return NotImplemented
            kept = [i for i in range(ndim) if i not in dims]
            place = ndim + axis
            axis = kept.index(place) - len(kept) if place in kept else (-1 if kept else None)
        return map_fields(array, lambda x: lax.squeeze(x, dims), axis=axis)
    if name == "rev":
        dims = params["dimensions"]
        flip = lambda x: lax.rev(x, [d for d in dims if x.shape[d] > 1])
        return NotImplemented if fixed in dims else map_fields(array, flip)
    if name == "slice":
        starts, limits = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * ndim
        take = lambda x, d: (starts[d], limits[d], strides[d])
        if fixed is not None and take(None, fixed) != (0, array.shape[fixed], 1):
            return NotImplemented

        def cut(x):
            full = [x.shape[d] == array.shape[d] and d != fixed for d in range(ndim)]
            bounds = [take(x, d) if full[d] else (0, x.shape[d], 1) for d in range(ndim)]
            return lax.slice(x, *zip(*bounds, strict=True)) if ndim else x

        return map_fields(array, cut)
    sizes = params["slice_sizes"]
    if fixed is not None and sizes[fixed] != array.shape[fixed]:
        return NotImplemented
    starts = call.dense(at)[1:]

    def window(x):
        full = [x.shape[d] == array.shape[d] and d != fixed for d in range(ndim)]
        begin = [s if f else jnp.zeros_like(s) for s, f in zip(starts, full, strict=True)]
        size = [n if f else x.shape[d] for d, (n, f) in enumerate(zip(sizes, full, strict=True))]
        return lax.dynamic_slice(x, begin, size)

    return map_fields(array, window)


@leaf_rule("broadcast_in_dim", QuantizedArray)
def _broadcast_quantized(call: Call, at: int) -> Any:
    """New axes of size 1 only: anything else would copy codes."""
    array, params = call.operands[at].array, call.params
    shape, dims = params["shape"], params["broadcast_dimensions"]
    if array.size != _product(shape) or isinstance(array.codes, SparseArray):
        return NotImplemented
    axis = array.axis
    axis = None if axis is None else dims[array.ndim + array.checked_axis] - len(shape)
    place = lambda x: lax.broadcast_in_dim(
        x, [x.shape[dims.index(i)] if i in dims else 1 for i in range(len(shape))], dims
    )
    return map_fields(array, place, axis=axis)


@leaf_rule("reshape", QuantizedArray)
def _reshape_quantized(call: Call, at: int) -> Any:
    """Merges and splits axes along which each field is either whole or constant."""
    array = call.operands[at].array
    if call.params["dimensions"] is not None:
        return NotImplemented
    array = entrywise(array)
    new = tuple(call.params["new_sizes"])
    runs = matching_runs(array.shape, new)
    if runs is None or array.group is not None:
        return _reshape_grouped(array, new, runs)
    axis = array.axis
    if axis is not None:
        run = next((r for r in runs if array.ndim + array.checked_axis in r[0]), None)
        wide = [d for d in run[1] if new[d] > 1] or run[1] if run else []
        axis = (wide[-1] if wide else len(new) - 1) - len(new) if new else None
    fields = []
    for x in (array.codes, array.scale, array.zero):
        shape = [1] * len(new)
        for old_axes, new_axes in runs:
            sizes = [x.shape[i] for i in old_axes] if x is not None else []
            if x is None or all(n == 1 for n in sizes):
                continue
            if sizes != [array.shape[i] for i in old_axes]:
                return NotImplemented
            for i in new_axes:
                shape[i] = new[i]
        fields.append(None if x is None else x.reshape(shape))
    codes, scale, zero = fields
    return array.replace(codes=codes, scale=scale, zero=zero, axis=axis)


def _reshape_grouped(array: QuantizedArray, new: tuple[int, ...], runs: Any) -> Any:
    """Grouped codes allow reshapes that leave the grouped axis and all after it alone."""
    tail = -array.checked_axis
    if runs is None or len(new) < tail or tuple(array.shape[-tail:]) != new[-tail:]:
        return NotImplemented
    head, new_head = array.shape[:-tail], new[:-tail]
    if any(x.shape[:-tail] != head for x in (array.codes, array.scale)):
        return NotImplemented
    return map_fields(array, lambda x: x.reshape(*new_head, *x.shape[len(head) :]))


def matching_runs(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Cuts two shapes of the same size into the shortest runs of axes with equal products.

    Example:
        >>> matching_runs((2, 3, 4), (6, 4))
        [([0, 1], [0]), ([2], [1])]
    """
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = _product(old[k] for k in left), _product(new[k] for k in right)
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b and i < len(old):
                a, i = a * old[i], i + 1
                left.append(i - 1)
            elif b < a and j < len(new):
                b, j = b * new[j], j + 1
                right.append(j - 1)
            else:
                return None
        runs.append((left, right))
    return runs


def _product(sizes: Any) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


@leaf_rule("concatenate", QuantizedArray)
def _concatenate(call: Call, at: int) -> Any:
    """Joins arrays of one format along an axis on which each field is whole."""
    parts = [x.array if isinstance(x, Ref) else x for x in call.operands]
    d = call.params["dimension"]
    if not all(isinstance(p, QuantizedArray) for p in parts):
        return NotImplemented
    parts = [entrywise(p) for p in parts]
    first = parts[0]
    meta = lambda p: (p.dtype, p.bits, p.axis, p.group, p.zero is None)
    bound = first.group is not None and d == first.ndim + first.checked_axis
    whole = all(p.scale.shape[d] == p.shape[d] for p in parts)
    if bound or not whole or any(meta(p) != meta(first) for p in parts):
        return NotImplemented
    others = {tuple(n for i, n in enumerate(p.scale.shape) if i != d) for p in parts}
    if len(others) > 1:
        return NotImplemented
    join = lambda *xs: jnp.concatenate(xs, d)
    zero = None if first.zero is None else join(*(p.zero for p in parts))
    codes, scale = join(*(p.codes for p in parts)), join(*(p.scale for p in parts))
    return first.replace(codes=codes, scale=scale, zero=zero)


@leaf_rule("split", QuantizedArray)
def _split(call: Call, at: int) -> Any:
    array, axis, sizes = call.operands[at].array, call.params["axis"], call.params["sizes"]
    array = entrywise(array)
    if array.group is not None and axis == array.ndim + array.checked_axis:
        return NotImplemented
    cut = lambda x: lax.split(x, sizes, axis) if x.shape[axis] > 1 else [x] * len(sizes)
    zeros = cut(array.zero) if array.zero is not None else [None] * len(sizes)
    fields = zip(cut(array.codes), cut(array.scale), zeros, strict=True)
    return [array.replace(codes=c, scale=s, zero=z) for c, s, z in fields]


@leaf_rule("mul", QuantizedArray)
def _scale(call: Call, at: int) -> Any:
    """A factor that the scale can take: one number, or one per channel."""
    array, other = call.operands[at].array, call.dense(at)[1 - at]
    ndim = getattr(other, "ndim", 0)
    if ndim and (ndim != array.ndim or array.group is not None):
        return NotImplemented
    if ndim and any(n not in (1, s) for n, s in zip(other.shape, array.scale.shape, strict=True)):
        return NotImplemented
    scale = array.scale * jnp.asarray(other, jnp.float32)
    return array.replace(scale=scale)
