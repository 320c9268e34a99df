"""A product with a weight that takes more than a conversion to decode, as one kernel for GPUs.

XLA fuses a conversion of codes into the operand of a matrix product; where decoding takes more
(steps of groups, a codebook, planar words), it writes the dense weight to memory, or a product per
group. This kernel, in Triton, reads codes and steps for each block of rows, and decodes in
registers.

Each program makes one block of the result, of at most 256 rows, in steps of a tile of codes. Codes
of less than eight bits may be looked up among their levels, in a table that stays in the first
cache; neighbours in a byte, and the runs of planar words, are told apart by shifts. A few rows make
few programs: then several share a block of the result, each with its part of K, and their float32
sums are added up.

A product moves `K N (bits + 32 / group) / 8` bytes of codes and steps for each 256 rows, and for
`2 M K N` operations; a dense bfloat16 weight would be `2 K N` bytes. For K = N = 8192 on an H100 in
microseconds, at 3350 GB/s and 989 TFLOP/s, with the instructions in the compiled loop, which are
issued at most 4 per cycle of 1.755 GHz by each of 132 multiprocessors:

    weight                   int4 / 128  nf4 / 128  mxfp4 / 32  mxfp8 / 32  mxfp6 / 32  int3 / 128
    megabytes                      35.7       35.7        41.9        75.5        58.7        27.3
    bytes (bfloat16: 40)             11         11          13          23          18           8
    instructions, 8 rows             19         26          31          20          30          25
    instructions, 1024 rows          86        138         144          79         118         121

The tensor units take 139 for 1024 rows. So with few rows the limit is decoding, which takes less
than reading a dense weight, and with many the tensor units. Waiting is not in these figures: this
kernel was compiled for an H100, and run step by step on CPUs only.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxopt_compress.kernels.decoded import codes_of_runs, in_tiles
from jaxopt_compress.kernels.forms import varying_alike, with_rows_merged
from jaxopt_compress.numerics.packing import layout

# The least K of a matrix instruction, in bytes, and the least columns of a block.
_LEAST_BYTES, _COLUMNS = 32, 64
# Programs to keep all multiprocessors of a large GPU busy, two on each.
_BUSY, _MAX_SPLITS = 256, 8
_CODES = ("int4", "uint4", "int8", "uint8", "float8_e4m3fn", "float8_e5m2")


class _Tiles(NamedTuple):
    """How K is cut.

    Attributes:
      depth: entries of each run that one step takes.
      runs: runs of a block of planar words; 1 for codes.
      width: entries of a run within a block.
      whole: whether each run of a step lies in one block and one group.
    """

    depth: int
    runs: int
    width: int
    whole: bool


def fits(x, codes, scale, group, *, bits=None, block=None):
    """Whether `decoded_dot` has tiles for these shapes and types; arguments as there, or types.

    Example:
      >>> x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
      >>> codes = jax.ShapeDtypeStruct((512, 768), jnp.int4)
      >>> scale = jax.ShapeDtypeStruct((4, 768), jnp.float32)
      >>> fits(x, codes, scale, 128), fits(x, codes, scale, 100)
      (True, False)
    """
    *batch, rows, depth = x.shape
    columns = codes.shape[-1]
    if bits is None or block is None:
        stored, readable = depth, codes.dtype.name in _CODES
    else:
        stored, readable = depth * bits // 8, codes.dtype == jnp.uint8
        readable = readable and depth % block == 0
    if not (isinstance(rows, int) and rows * depth > 0 and readable and depth % group == 0):
        return False
    tiles = _tiles(rows, depth, group, bits, block)
    return (
        x.dtype in (jnp.bfloat16, jnp.float16)
        and depth % (tiles.depth * tiles.runs) == 0
        and columns % _COLUMNS == 0
        and codes.shape == (*batch, stored, columns)
        and scale.shape == (*batch, depth // group, columns)
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
    lookup=True,
    preferred=jnp.float32,
    interpret=False,
):
    r"""Contracts `x` with a weight stored as codes and steps, decoded on the way.

    .. math:: y_{mn} = \sum_k x_{mk} \,
              \mathrm{round}(\mathrm{decode}(q_{kn}) \, s_{\lfloor k/g \rfloor n})

    rounded to the type of `x`, as a stored weight would be; with one step per column levels are
    rounded, and steps multiply the float32 sums. Derivatives are those of the same product without
    a kernel.

    Args:
      x: `[*batch, M, K]`, bfloat16 or float16.
      codes: `[*batch, K, N]`, integers of four or eight bits or float8; with `bits`,
        `[*batch, K * bits / 8, N]`, uint8, planar words as `jaxopt_compress.numerics.packing`
        lays them out.
      scale: `[*batch, K / group, N]`, floating point; multiplies in float32.
      decode: an elementwise function from codes, in an array of any shape, to float32 levels. Codes
        from words come as unsigned integers of some type.
      group: number of consecutive `k` that share a step.
      bits: of a code in planar words; None for codes.
      block: number of consecutive `k` that are packed together.
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
    given = {"decode": decode, "group": group, "bits": bits, "block": block, "preferred": preferred}
    product = functools.partial(_product, lookup=lookup)
    return in_tiles(product, fits, x, codes, scale, interpret=interpret, **given)


def integer_fits(x_codes, codes, scale, group):
    """Whether `integer_dot` has tiles for these shapes and types."""
    whole = {"int4", "int8"} >= {codes.dtype.name} and x_codes.dtype == jnp.int8
    x = jax.ShapeDtypeStruct(x_codes.shape, jnp.bfloat16)
    return whole and group % _LEAST_BYTES == 0 and fits(x, codes, scale, group)


def integer_dot(x_codes, codes, scale, *, group, interpret=False):
    r"""Contracts integer codes with integer codes in groups.

    .. math:: y_{mn} = \sum_g s_{gn} \sum_{k \in g} p_{mk} q_{kn}

    Up to 128 products are summed in int32, which is exact, and these sums in float32.

    Args:
      x_codes: `[*batch, M, K]`, int8.
      codes: `[*batch, K, N]`, int4 or int8.
      scale: `[*batch, K / group, N]`, floating point.
      group: number of consecutive `k` that share a scale, a multiple of 32.
      interpret: whether to run the kernel step by step, on any device.

    Returns:
      `[*batch, M, N]`, float32.

    Example:
      >>> x, codes = jnp.full((1, 64), 3, jnp.int8), jnp.full((64, 64), -2, jnp.int4)
      >>> print(integer_dot(x, codes, jnp.ones((2, 64)), group=32, interpret=True)[0, :2])
      [-384. -384.]
    """
    if not integer_fits(x_codes, codes, scale, group):
        raise ValueError(
            f"no tiles for x {x_codes.dtype}{list(x_codes.shape)}, codes {codes.dtype}"
            f"{list(codes.shape)}, scale {list(scale.shape)}, group={group}: see integer_fits"
        )
    given = {"decode": None, "group": group, "bits": None, "block": None, "preferred": jnp.float32}
    product = functools.partial(_product, lookup=False, interpret=interpret, **given)
    return with_rows_merged(product)(x_codes, codes, scale)


def _product(x, codes, scale, *, lookup, interpret, **given):
    if x.ndim > 2:
        one = functools.partial(_product, lookup=lookup, interpret=interpret, **given)
        return jax.vmap(one)(x, codes, scale)
    (rows, depth), columns = x.shape, codes.shape[1]
    decode, group, bits, block = (given[key] for key in ("decode", "group", "bits", "block"))
    tiles = _tiles(rows, depth, group, bits, block, x.dtype.itemsize)
    bm, bn, steps, splits = _blocks(rows, depth, columns, tiles, decode is None)
    preferred = given["preferred"] if splits == 1 else jnp.float32
    table = jnp.zeros(1, jnp.float32)
    read = decode and (lambda codes, _: decode(codes))
    if lookup and (bits is not None or codes.dtype.name in ("int4", "uint4")):
        every = jnp.arange(2 ** (bits or 4))
        table = decode(every.astype(jnp.int32 if bits is not None else codes.dtype))
        read = lambda codes, table_ref: table_ref[codes.astype(jnp.int32) & (table.size - 1)]
    padded = pl.cdiv(rows, bm) * bm
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    operands = varying_alike([x, codes, scale.astype(jnp.float32), table.astype(jnp.float32)])
    manual = jax.typeof(operands[0]).manual_axis_type
    y = pl.pallas_call(
        functools.partial(_kernel, read=read, group=group, bits=bits, tiles=tiles, steps=steps),
        out_shape=jax.ShapeDtypeStruct(
            (splits, padded, columns), preferred, manual_axis_type=manual
        ),
        grid=(columns // bn, padded // bm, splits),
        in_specs=[
            pl.BlockSpec((bm, depth), lambda n, m, s: (m, 0)),
            pl.BlockSpec((codes.shape[0], bn), lambda n, m, s: (0, n)),
            pl.BlockSpec((depth // group, bn), lambda n, m, s: (0, n)),
            pl.BlockSpec(table.shape, lambda n, m, s: (0,)),
        ],
        out_specs=pl.BlockSpec((None, bm, bn), lambda n, m, s: (s, m, n)),
        compiler_params=pltriton.CompilerParams(
            num_warps=8 if bm >= 128 else 4,
            # Each run of a step has its rows of x, and steps, on their way.
            num_stages=2 if bm * tiles.runs > 512 else 3,
        ),
        interpret=interpret,
        name="decoded_dot",
    )(*operands)
    y = y.sum(0).astype(given["preferred"]) if splits > 1 else y[0]
    return y[:rows]


def _tiles(rows, depth, group, bits, block, itemsize=2):
    runs = 1 if bits is None else layout(bits).runs
    width = (depth if bits is None else block) // runs
    # Many rows take long over a tile, few want many bytes on their way.
    least = _LEAST_BYTES // itemsize
    most = max(least, (128 if rows <= 32 else 64) // runs)
    common = math.gcd(group, width)
    common = min(common & -common, most)
    return _Tiles(max(common, least), runs, width, common >= least)


def _blocks(rows, depth, columns, tiles, integers=False):
    """Rows and columns of a block, the steps that it takes, and over how many programs."""
    bm = next((b for b in (16, 32, 64, 128) if rows <= b), 256)
    # Sums of integers take registers of their own, and no half of a block should be empty.
    if bm == 256 and (integers or 0 < rows % 256 <= 128):
        bm = 128
    bn = 2 * _COLUMNS if bm >= 128 and columns % (2 * _COLUMNS) == 0 else _COLUMNS
    steps, splits = depth // (tiles.depth * tiles.runs), 1
    programs = columns // bn * pl.cdiv(rows, bm)
    while programs * splits < _BUSY and splits < _MAX_SPLITS and steps % 8 == 0:
        steps, splits = steps // 2, splits * 2
    return bm, bn, steps, splits


def _kernel(x_ref, codes_ref, scale_ref, table_ref, y_ref, *, read, group, bits, tiles, steps):
    """One block of the result, or of a part of its sum."""
    rows, columns = jnp.arange(x_ref.shape[0])[:, None], jnp.arange(y_ref.shape[1])[None]
    entries, first = jnp.arange(tiles.depth), pl.program_id(2) * steps
    grouped = read is None or group < x_ref.shape[1]
    words = 1 if bits is None else layout(bits).rows

    # Of a step whose runs are whole, positions are where a run starts, otherwise each entry's.
    def along(at):
        return pl.ds(pl.multiple_of(at, tiles.depth), tiles.depth)

    def codes_at(at):
        return codes_ref[along(at), :] if tiles.whole else codes_ref[at[:, None], columns]

    def x_at(at):
        return x_ref[:, along(at)] if tiles.whole else x_ref[rows, at[None]]

    def scale_at(at):
        at = lax.div(at, group)
        return scale_ref[pl.ds(at, 1), :] if tiles.whole else scale_ref[at[:, None], columns]

    def step(i, sums):
        at = (first + i) * tiles.depth
        at = at if tiles.whole else at + entries
        block, within = lax.div(at, tiles.width), lax.rem(at, tiles.width)
        held = [codes_at((block * words + k) * tiles.width + within) for k in range(words)]
        runs = held if bits is None else codes_of_runs([w.astype(jnp.int32) for w in held], bits)
        for r, codes in enumerate(runs):
            at = (block * tiles.runs + r) * tiles.width + within
            if read is None:
                y = jnp.dot(x_at(at), codes.astype(jnp.int8), preferred_element_type=jnp.int32)
                sums += y.astype(jnp.float32) * scale_at(at)
                continue
            weight = read(codes, table_ref)
            weight = (weight * scale_at(at) if grouped else weight).astype(x_ref.dtype)
            sums += jnp.dot(x_at(at), weight, preferred_element_type=jnp.float32)
        return sums

    sums = lax.fori_loop(0, steps, step, jnp.zeros(y_ref.shape, jnp.float32))
    y_ref[...] = (sums if grouped else sums * scale_ref[...]).astype(y_ref.dtype)
