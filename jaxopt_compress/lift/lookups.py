"""Lookups in the stored form of a table: rows of every field, the rest of the table is not read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.arrays import CodebookArray, LowRankArray, QuantizedArray, SparseArray
from jaxopt_compress.lift.interpreter import Call
from jaxopt_compress.lift.products import contraction_rule, dense_operand
from jaxopt_compress.lift.views import plain_codes, plain_steps
from jaxopt_compress.typing import Value


@contraction_rule("gather", QuantizedArray)
def _gather(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Gathers from each field, and dequantizes what was found."""
    if at != 0:
        return NotImplemented
    w, indices = values
    sizes, looked_up = call.params["slice_sizes"], call.params["dimension_numbers"].start_index_map
    w = plain_steps(w)
    bound = w.group_size is not None or w.block is not None
    whole = all(sizes[d] == w.shape[d] for d in range(w.ndim) if d not in looked_up)
    along = bound and w.ndim + w.checked_axis in looked_up
    if not whole or along or isinstance(w.codes, SparseArray):
        return _bind(call, dense_operand(w, w.dtype), indices, sizes)
    rows = lambda x: _rows(call, x, w.shape, indices)
    codes, scale = rows(w.codes), rows(w.scale)
    zero = None if w.zero is None else rows(w.zero)
    axis = _place(call, w) - codes.ndim if bound else None
    found = w.replace(codes=codes, scale=scale, zero=zero, axis=axis)
    return filled(call, dense_operand(found, call.out.dtype), w.shape, indices)


def filled(call: Call, y: jax.Array, shape: tuple[int, ...], indices: jax.Array) -> jax.Array:
    """Puts the fill value where a lookup was out of bounds, which codes cannot mark."""
    given = call.params
    if lax.GatherScatterMode.from_any(given["mode"]) != lax.GatherScatterMode.FILL_OR_DROP:
        return y
    looked_up = given["dimension_numbers"].start_index_map
    there = jnp.ones([n if d in looked_up else 1 for d, n in enumerate(shape)], bool)
    sizes = [n if d in looked_up else 1 for d, n in enumerate(given["slice_sizes"])]
    fill = jnp.nan if given["fill_value"] is None else given["fill_value"]
    return jnp.where(_bind(call, there, indices, sizes, False), y, jnp.asarray(fill, y.dtype))


def _place(call: Call, w: QuantizedArray) -> int:
    """Where the result has the axis along which codes are grouped or packed."""
    return _places(call, w.ndim)[w.ndim + w.checked_axis]


def _places(call: Call, ndim: int) -> dict[int, int]:
    """Axis of the table -> axis of the result, for the axes that the result has."""
    spec = call.params["dimension_numbers"]
    gone = (*spec.collapsed_slice_dims, *spec.operand_batching_dims)
    kept = [d for d in range(ndim) if d not in gone]
    return dict(zip(kept, spec.offset_dims, strict=True))


def _rows(call: Call, x: jax.Array, shape: tuple[int, ...], indices: jax.Array) -> jax.Array:
    """The gather on a field, which may have size 1 along an axis that is looked up."""
    looked_up = call.params["dimension_numbers"].start_index_map
    sizes = [
        min(n, x.shape[d]) if d in looked_up else x.shape[d]
        for d, n in enumerate(call.params["slice_sizes"])
    ]
    full = [x.shape[d] == shape[d] for d in looked_up]
    if not all(full):
        indices = jnp.where(jnp.asarray(full), indices, 0)
    return _bind(call, x, indices, tuple(sizes), 0)


def _bind(
    call: Call,
    x: jax.Array,
    indices: jax.Array,
    sizes: Sequence[int],
    fill: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    given = call.params
    return lax.gather(
        x,
        indices,
        given["dimension_numbers"],
        tuple(sizes),
        unique_indices=given["unique_indices"],
        indices_are_sorted=given["indices_are_sorted"],
        mode=given["mode"],
        fill_value=given["fill_value"] if fill is None else fill,
    )


@contraction_rule("gather", SparseArray)
def _gather_sparse(call: Call, at: int, values: Sequence[Value]) -> Value:
    if at != 0:
        return NotImplemented
    w, indices = values
    return _bind(call, w.materialize(), indices, call.params["slice_sizes"])


@contraction_rule("gather", CodebookArray)
def _gather_codebook(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Gathers codes, and the codebooks of those that have their own; then looks values up."""
    if at != 0:
        return NotImplemented
    w, indices = values
    sizes, looked_up = call.params["slice_sizes"], call.params["dimension_numbers"].start_index_map
    places, axis = _places(call, w.ndim), w.ndim + w.axis
    whole = all(sizes[d] == w.shape[d] for d in range(w.ndim) if d not in looked_up)
    across = axis in looked_up
    # Entries that are looked up one by one need one book for all of them, and a code each.
    single = w.vector == 1 and w.centroids.size == w.clusters and call.out.ndim > 0
    if not whole or isinstance(w.codes, SparseArray) or (across and not single):
        return _bind(call, dense_operand(w, w.dtype), indices, sizes)
    w = plain_codes(w) if across else w
    codes = _rows(call, w.codes, w.shape, indices)
    place = codes.ndim - 1 if across else places[axis]
    if across or all(w.centroids.shape[d] == 1 for d in looked_up):
        # One book serves all that is found.
        shape = [1] * codes.ndim
        for d, to in places.items():
            shape[to] = w.centroids.shape[d] if d != axis else 1
        shape[place] = w.centroids.shape[axis]
        centroids = w.centroids.reshape(shape)
    else:
        centroids = _rows(call, w.centroids, w.shape, indices)
    found = w.replace(codes=codes, centroids=centroids, axis=place - codes.ndim)
    return filled(call, dense_operand(found, call.out.dtype), w.shape, indices)


@contraction_rule("gather", LowRankArray)
def _gather_low_rank(call: Call, at: int, values: Sequence[Value]) -> Value:
    """Rows of the factor that has the axis looked up, times the other; that axis is first or last.

    The other axes are taken whole: those of the other factor.
    """
    spec, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    w, indices = values
    looked_up, last = tuple(spec.start_index_map), w.ndim - 1
    first = looked_up == (0,) and w.out_ndim == last
    if at != 0 or not (first or (looked_up == (last,) and w.out_ndim == 1)):
        return NotImplemented
    (axis,) = looked_up
    whole = all(sizes[d] == w.shape[d] for d in range(w.ndim) if d != axis)
    if tuple(spec.collapsed_slice_dims) != looked_up or not whole:
        return NotImplemented
    table, other = (w.u, w.v) if first else (w.v, w.u)
    table, other = dense_operand(table, w.dtype), dense_operand(other, w.dtype)
    table = table.reshape((-1, w.rank) if first else (w.rank, -1))
    rest = [n for d, n in enumerate(w.shape) if d != axis]
    other = other.reshape((w.rank, *rest) if first else (*rest, w.rank))
    lead = indices.ndim - 1
    rows = lax.gather(
        table if first else table.T,
        indices,
        lax.GatherDimensionNumbers((lead,), (0,), (0,)),
        (1, w.rank),
        mode=call.params["mode"],
        fill_value=0,
    )
    y = jnp.tensordot(rows, other, ((lead,), (0 if first else len(rest),)))
    # The axes that were taken whole go where the function has them.
    y = jnp.moveaxis(y, range(lead, y.ndim), spec.offset_dims)
    return filled(call, y.astype(call.out.dtype), w.shape, indices)
