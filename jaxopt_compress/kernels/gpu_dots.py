"""Products with a weight that takes more than a conversion to decode, by a kernel for GPUs."""

import functools
import math

import jax.numpy as jnp

from jaxopt_compress.kernels import gpu_kernel
from jaxopt_compress.kernels.decoded import (
    STEPS,
    in_tiles,
    integers_in_tiles,
    layer_of,
    layer_types,
)
from jaxopt_compress.kernels.integer_dots import exact_parts
from jaxopt_compress.kernels.partitioning import split_over_devices

_CODES = ("int4", "uint4", "int8", "uint8", "float8_e4m3fn", "float8_e5m2")


def fits(x, codes, scale, group, *, bits=None, block=None, transposed=False):
    """Whether `decoded_dot` has tiles for these shapes and types; arguments as there, or types.

    Example:
      >>> import jax
      >>> x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
      >>> codes = jax.ShapeDtypeStruct((512, 768), jnp.int4)
      >>> scale = jax.ShapeDtypeStruct((4, 768), jnp.float32)
      >>> fits(x, codes, scale, 128), fits(x, codes, scale, 100)
      (True, False)
    """
    weight = layer_types(codes, scale, None, transposed)
    return x.dtype in (jnp.bfloat16, jnp.float16) and _tiled(x, *weight, group, bits, block)


def _tiled(x, codes, scale, group, bits=None, block=None):
    *batch, rows, depth = x.shape
    columns = codes.shape[-1]
    if bits is None or block is None:
        stored, readable = depth, codes.dtype.name in _CODES
    else:
        stored, readable = depth * bits // 8, codes.dtype == jnp.uint8
        readable = readable and depth % block == 0
    if not (isinstance(rows, int) and rows * depth > 0 and readable and depth % group == 0):
        return False
    tiles = gpu_kernel.tiles_of(rows, depth, group, bits, block, x.dtype.itemsize)
    return (
        depth % (tiles.depth * tiles.runs) == 0
        and columns % gpu_kernel.COLUMNS == 0
        and codes.shape == (*batch, stored, columns)
        and scale.shape == (*batch, depth // group, columns)
        and scale.dtype.name in STEPS
    )


def decoded_dot(
    x,
    codes,
    scale,
    decode,
    *,
    group,
    bits=None,
    block=None,
    layer=None,
    transposed=False,
    lookup=True,
    preferred=jnp.float32,
    interpret=False,
):
    r"""Contracts `x` with a weight stored as codes and steps, decoded on the way.

    .. math:: y_{mn} = \sum_k x_{mk} \,
              \mathrm{round}(\mathrm{decode}(q_{kn}) \, s_{\lfloor k/g \rfloor n})

    rounded to the type of `x`, as a stored weight would be; with one step per column levels are
    rounded, and steps multiply the float32 sums. Derivatives are those of the same product without
    a kernel. Compilers split it over devices as they do any product.

    Args:
      x: `[*batch, M, K]`, bfloat16 or float16.
      codes: integers of four or eight bits, float8, or planar words, as for `tpu_dots.decoded_dot`.
      scale: `[*batch, K / group, N]`, float32, bfloat16, float8_e4m3fn or float8_e8m0fnu;
        multiplies in float32.
      decode: as there.
      group: as there.
      bits: as there.
      block: as there.
      layer: as there.
      transposed: as there.
      lookup: whether codes of less than eight bits pick from a table of levels, instead of being
        decoded one by one, which pays where that takes less than a few instructions.
      preferred: type of the result; sums are float32.
      interpret: whether to run the kernel step by step, on any device.

    Returns:
      `[*batch, M, N]` of type `preferred`.

    Raises:
      ValueError: if the arguments do not fit, by `fits`.

    Example:
      >>> codes = jnp.full((128, 64), 3, jnp.uint4)
      >>> scale = jnp.full((2, 64), 0.5)
      >>> square = lambda c: c.astype(jnp.float32) ** 2
      >>> x = jnp.ones((1, 128), jnp.bfloat16)
      >>> print(decoded_dot(x, codes, scale, square, group=64, interpret=True)[0, :2])
      [576. 576.]
    """
    given = {"decode": decode, "group": group, "bits": bits, "block": block}
    given |= {"transposed": transposed, "preferred": preferred, "interpret": interpret}
    product = functools.partial(_split, lookup=lookup)
    return in_tiles(product, fits, x, codes, scale, layer, **given)


def _reachable(codes):
    """Whether Triton finds every entry.

    It counts up to 2^32 bytes in 32 bits, but takes these as numbers with a sign.
    """
    halves = codes.dtype.name in ("int4", "uint4")  # Two of them are a byte, but not everywhere.
    return not 2**31 <= math.prod(codes.shape) <= 2 ** (33 if halves else 32)


def integer_fits(x_codes, codes, scale, group, *, transposed=False):
    """Whether `integer_dot` has tiles for these shapes and types."""
    whole = x_codes.dtype == jnp.int8 and codes.dtype.name in ("int4", "int8")
    whole = (
        whole and group % gpu_kernel.LEAST_BYTES == 0 and exact_parts(group, "int8", "int8") == 1
    )
    weight = layer_types(codes, scale, None, transposed)
    return whole and _tiled(x_codes, *weight, group)


def integer_dot(
    x_codes,
    codes,
    scale,
    *,
    group,
    layer=None,
    transposed=False,
    preferred=jnp.float32,
    interpret=False,
):
    r"""Contracts integer codes with integer codes.

    .. math:: y_{mn} = \sum_g s_{gn} \sum_{k \in g} p_{mk} q_{kn}

    Products of one group for all are summed in int32, which is exact; of several up to 128 are, and
    these sums are added up in float32.

    Args:
      x_codes: `[*batch, M, K]`, int8.
      codes: `[*batch, K, N]`, int4 or int8.
      scale: `[*batch, K / group, N]`, of the same types.
      group: number of consecutive `k` that share a scale, a multiple of 32.
      layer: as for `decoded_dot`.
      transposed: as there.
      preferred: type of the result.
      interpret: whether to run the kernel step by step, on any device.

    Returns:
      `[*batch, M, N]` of type `preferred`.

    Raises:
      ValueError: if the arguments do not fit, by `integer_fits`.

    Example:
      >>> x, codes = jnp.full((1, 64), 3, jnp.int8), jnp.full((64, 64), -2, jnp.int4)
      >>> print(integer_dot(x, codes, jnp.ones((2, 64)), group=32, interpret=True)[0, :2])
      [-384. -384.]
    """
    given = {"group": group, "transposed": transposed, "preferred": preferred}
    product = functools.partial(_split, lookup=False, interpret=interpret)
    return integers_in_tiles(product, integer_fits, x_codes, codes, scale, layer, **given)


def _split(x, codes, scale, layer, *, group, **given):
    def product(x, codes, scale, layer, group):
        return gpu_kernel.product(x, codes, scale, layer, group=group, **given)

    if codes.shape[0] > 1 and not _reachable(codes):
        codes = layer_of(codes, layer)[None]
    own, how = integer_fits, {"transposed": given["transposed"]}
    if given["decode"] is not None:
        own, how = fits, how | {"bits": given["bits"], "block": given["block"]}
    own = functools.partial(own, **how)
    return split_over_devices(product, own, group, given["transposed"])(x, codes, scale, layer)
