"""Products with a weight that takes more than a conversion to decode, by a kernel for TPUs."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.kernels import tpu_kernel
from jaxopt_compress.kernels.decoded import STEPS, in_tiles, integers_in_tiles, layer_types
from jaxopt_compress.numerics.packing import layout

_CODES = ("int4", "int8", "uint4", "uint8", "float8_e4m3fn", "float8_e5m2")


def fits(x, codes, scale, group, *, bits=None, block=None, transposed=False):
    """Whether `decoded_dot` has tiles for these shapes and types; arguments as there, or types.

    Example:
      >>> x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
      >>> codes = jax.ShapeDtypeStruct((512, 768), jnp.uint4)
      >>> scale = jax.ShapeDtypeStruct((4, 768), jnp.float32)
      >>> fits(x, codes, scale, 128), fits(x, codes, scale, 100)
      (True, False)
    """
    codes, scale = layer_types(codes, scale, None, transposed)
    *batch, rows, depth = x.shape
    columns, chunk = codes.shape[-1], tpu_kernel.CHUNK_DEPTH
    if bits is None or block is None:
        stored, readable = depth, codes.dtype.name in _CODES
    else:
        # Rows of words are cut at whole registers of 32-bit elements, eight rows each.
        runs = layout(bits).runs
        stored, readable = depth * bits // 8, codes.dtype == jnp.uint8
        readable = readable and block % (8 * runs) == 0 and chunk % block == 0
    return (
        readable
        and x.dtype == jnp.bfloat16
        and isinstance(rows, int)
        and rows > 0
        and group % 8 == 0
        and depth % group == 0
        and (chunk % group == 0 or group % chunk == 0)
        and depth % tpu_kernel.unit_of_depth(bits, transposed) == 0
        and columns % tpu_kernel.CHUNK_COLUMNS == 0
        and depth * tpu_kernel.CHUNK_COLUMNS * x.dtype.itemsize <= tpu_kernel.MAX_DECODED_BYTES
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
    preferred=jnp.float32,
    interpret=False,
):
    r"""Contracts `x` with a weight stored as codes and steps, decoded on the way.

    .. math:: y_{mn} = \sum_k x_{mk} \,
              \mathrm{round}(\mathrm{decode}(q_{kn}) \, s_{\lfloor k/g \rfloor n})

    rounded to the type of `x`, as a stored weight would be. Derivatives are those of the same
    product without a kernel.

    Args:
      x: `[*batch, M, K]`, bfloat16.
      codes: `[*batch, K, N]` of four or eight bits, integers or floats; with `bits`,
        `[*batch, K * bits / 8, N]`, uint8, planar words as `jaxopt_compress.numerics.packing`
        lays them out.
      scale: `[*batch, K / group, N]`, float32, bfloat16, float8_e4m3fn or float8_e8m0fnu;
        multiplies in float32.
      decode: an elementwise function from codes, in an array of any shape, to float32 levels. Codes
        from words come as unsigned integers of some type.
      group: number of consecutive `k` that share a step.
      bits: of a code in planar words; None for codes.
      block: number of consecutive `k` that are packed together.
      layer: if given, int32: `codes` and `scale` have an axis of layers in front, or of size 1,
        and the parts of this layer are read there.
      transposed: whether the weight is `[N, K]`: `codes` are `[*batch, N, K]`, or words of K
        along the last axis, and `scale` is `[*batch, N, K / group]`.
      preferred: type of the result; sums are float32.
      interpret: whether to run the kernel step by step, on any device.

    Returns:
      `[*batch, M, N]` of type `preferred`.

    Raises:
      ValueError: if the arguments do not fit, by `fits`.

    Example:
      >>> codes = jnp.full((256, 256), 3, jnp.uint4)
      >>> scale = jnp.full((2, 256), 0.5)
      >>> square = lambda c: c.astype(jnp.float32) ** 2
      >>> x = jnp.ones((1, 256), jnp.bfloat16)
      >>> print(decoded_dot(x, codes, scale, square, group=128, interpret=True)[0, :2])
      [1152. 1152.]
    """
    given = {"decode": decode, "group": group, "bits": bits, "block": block}
    given |= {"transposed": transposed, "preferred": preferred, "interpret": interpret}
    return in_tiles(tpu_kernel.product, fits, x, codes, scale, layer, **given)


def integer_fits(x_codes, codes, scale, group, *, transposed=False):
    """Whether `integer_dot` has tiles for these shapes and types."""
    x = jax.ShapeDtypeStruct(x_codes.shape, jnp.bfloat16)
    return (
        x_codes.dtype == jnp.int8
        and codes.dtype.name in ("int4", "int8")
        and group % 128 == 0
        and fits(x, codes, scale, group, transposed=transposed)
    )


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
    r"""Contracts integer codes with integer codes in groups.

    .. math:: y_{mn} = \sum_g s_{gn} \sum_{k \in g} p_{mk} q_{kn}

    Products of one group, up to 256 of them, are summed in int32, which is exact; these sums are
    added up in float32.

    Args:
      x_codes: `[*batch, M, K]`, int8.
      codes: `[*batch, K, N]`, int4 or int8.
      scale: `[*batch, K / group, N]`, of the types of `decoded_dot`.
      group: number of consecutive `k` that share a scale, a multiple of 128.
      layer: as for `decoded_dot`.
      transposed: as there.
      preferred: type of the result.
      interpret: whether to run the kernel step by step, on any device.

    Returns:
      `[*batch, M, N]` of type `preferred`.

    Raises:
      ValueError: if the arguments do not fit, by `integer_fits`.

    Example:
      >>> x, codes = jnp.full((1, 256), 3, jnp.int8), jnp.full((256, 256), -2, jnp.int4)
      >>> print(integer_dot(x, codes, jnp.ones((2, 256)), group=128, interpret=True)[0, :2])
      [-1536. -1536.]
    """
    given = {"group": group, "transposed": transposed, "preferred": preferred}
    product = functools.partial(tpu_kernel.product, interpret=interpret)
    return integers_in_tiles(product, integer_fits, x_codes, codes, scale, layer, **given)
