"""How compilers split a kernel over devices."""

import math

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_compress.kernels.decoded import layer_types


def split_over_devices(product, fits, group, transposed=False):
    """`product(x, codes, scale, layer, group)`, which compilers split by batch, rows, columns, K.

    Columns and K are split as the codes are, where the kernel takes the parts, and whole otherwise.
    Devices that hold parts of K add up their products, in the type of the result.

    Args:
      product: the kernel: of `[*batch, M, K]`, `[layers or 1, *batch, K or words of it, N]`,
        `[layers or 1, *batch, K / group, N]` and the number of a layer, to `[*batch, M, N]`.
      fits: `fits(x, codes, scale, group)`, whether the kernel takes a layer of such types.
      group: number of consecutive `k` that share a step.
      transposed: whether N comes before K in codes and steps.

    Returns:
      A function of `x`, `codes`, `scale` and `layer`.
    """

    def in_order(along, columns):
        return (columns, along) if transposed else (along, columns)

    def partition(mesh, args, result):
        del result
        *batch, rows, _ = _spec(args[0])
        along, columns = in_order(*_spec(args[1])[-2:])
        one = in_order(*args[2].shape[-2:])[0] == 1  # Then any part of K has that step.

        def specs(along, columns):
            steps = None if one else along
            weight = [P(None, *batch, *in_order(k, columns)) for k in (along, steps)]
            return P(*batch, rows, along), *weight, P()

        def taken(along, columns):
            whole = zip(args, specs(along, columns), strict=True)
            parts = [_part(array, spec, mesh) for array, spec in whole]
            if None in parts:
                return False
            x, codes, scale, layer = parts
            depth = args[0].shape[-1] // _shards(along, mesh)
            return fits(x, *layer_types(codes, scale, layer), depth if one else group)

        tried = [(along, columns), (None, columns), (along, None)]
        along, columns = next((t for t in tried if taken(*t)), (None, None))

        def part(x, codes, scale, layer):
            y = product(x, codes, scale, layer, x.shape[-1] if one else group)
            return lax.psum(y, along) if along else y

        made = NamedSharding(mesh, P(*batch, rows, columns))
        given = tuple(NamedSharding(mesh, spec) for spec in specs(along, columns))
        return mesh, part, made, given

    def split(x, codes, scale, layer):
        batch = " ".join(f"b{i}" for i in range(x.ndim - 2))
        codes_axes, step_axes = (" ".join(in_order(k, "n")) for k in "wg")
        rule = f"{batch} m k, c {batch} {codes_axes}, s {batch} {step_axes}, -> {batch} m n"
        call = custom_partitioning(lambda *operands: product(*operands, group))
        call.def_partition(partition=partition, sharding_rule=rule)
        return call(x, codes, scale, layer)

    return split


def _spec(given):
    spec = given.sharding.spec
    return (*spec, *(None,) * (len(given.shape) - len(spec)))


def _names(axis):
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _shards(axis, mesh):
    return math.prod(mesh.shape[name] for name in _names(axis))


def _part(array, spec, mesh):
    """The type of a device's part; None if a mesh axis splits it twice, or into unequal parts."""
    names = [name for axis in spec for name in _names(axis)]
    sizes = [(n, _shards(axis, mesh)) for n, axis in zip(array.shape, spec, strict=True)]
    if len(names) > len(set(names)) or any(n % shards for n, shards in sizes):
        return None
    return jax.ShapeDtypeStruct([n // shards for n, shards in sizes], array.dtype)
