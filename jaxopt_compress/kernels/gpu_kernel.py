"""A product with a weight that takes more than a conversion to decode, as one kernel for GPUs.

XLA fuses a conversion of codes into the operand of a matrix product; where decoding takes more
(steps of groups, a codebook, planar words), it writes the dense weight to memory, or a product per
group. This kernel, in Triton, reads codes and steps for each block of rows, and decodes in
registers. It reads a layer out of its stack; the loop has as many instructions for one of 80 layers
of 8192 x 28672, whose positions take 64 bits, as for a weight alone.

Each program makes one block of the result, of at most 256 rows, in steps of a tile of codes. Codes
of less than eight bits may be looked up among their levels, in a table that stays in the first
cache; neighbours in a byte, and the runs of planar words, are told apart by shifts. A few rows make
few programs: then several share a block of the result, each with its part of K, and their float32
sums are added up.

A product moves `K N (bits + bits of a step / group) / 8` bytes of codes and steps for each 256
rows, and for `2 M K N` operations; a dense bfloat16 weight would be `2 K N` bytes. For K = N = 8192
on an H100 in microseconds, at 3350 GB/s and 989 TFLOP/s, with the instructions in the compiled
loop, which are issued at most 4 per cycle of 1.755 GHz by each of 132 multiprocessors; steps of mx
formats are read as 8 bits for up to 32 rows:

    weight                   int4 / 128  nf4 / 128  mxfp4 / 32  mxfp8 / 32  mxfp6 / 32  int3 / 128
    megabytes                      35.7       35.7        35.7        69.2        52.4        27.3
    bytes (bfloat16: 40)             11         11          11          21          16           8
    instructions, 8 rows             19         26          32          21          36          25
    instructions, 1024 rows          86        138         144          79         118         121

Codes `[N, K]` are turned in registers: the loop then has 1.5 to 1.6 times as many
instructions for nf4, mxfp4 and int4 with 8 rows, 1.3 to 1.4 with 1024, and 1.0 to 1.3 for int3.

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
from jax.typing import DTypeLike

from jaxopt_compress.kernels.decoded import codes_of_runs, layer_of
from jaxopt_compress.kernels.forms import varying_alike
from jaxopt_compress.numerics.packing import layout
from jaxopt_compress.numerics.steps import power_of, step_value

# The least K of a matrix instruction, in bytes, and the least columns of a block.
LEAST_BYTES, COLUMNS = 32, 64
# Programs to keep the multiprocessors of a large GPU busy; blocks of few rows leave room for two.
_BUSY, _MAX_SPLITS = 128, 8
# Rows up to which steps are widened where they are used.
_FEW_ROWS = 32


class Tiles(NamedTuple):
    """How K is cut.

    Attributes:
      depth: entries of each run that one step takes.
      runs: runs of a block of planar words; 1 for codes.
      width: entries of a run within a block.
      whole: whether each run of a step is inside one block and one group.
    """

    depth: int
    runs: int
    width: int
    whole: bool


def product(x, codes, scale, layer, **given):
    """The kernel, one for each matrix of a batch; keywords as for `gpu_dots.decoded_dot`.

    Codes and steps have an axis of layers in front, or of size 1. Without `decode` codes meet those
    of `x` as integers.
    """
    if x.ndim == 2:
        return _of_matrices(x, codes, scale, layer, **given)
    one = functools.partial(product, **given)
    return jax.vmap(one, (0, 1, 1, None))(x, codes, scale, layer)


def _of_matrices(
    x,
    codes,
    scale,
    layer,
    *,
    decode,
    group,
    bits,
    block,
    transposed,
    lookup,
    preferred: DTypeLike,
    interpret,
):
    (rows, depth), columns = x.shape, codes.shape[1 if transposed else 2]
    if one_step := depth == group:  # In either layout.
        scale = scale.reshape(-1, 1, columns)
    tiles = tiles_of(rows, depth, group, bits, block, x.dtype.itemsize)
    bm, bn, steps, splits = _blocks(rows, depth, columns, tiles, decode is None)
    dtype = preferred if splits == 1 else jnp.float32
    read, table = _reader(decode, codes.dtype, bits, lookup)
    padded = pl.cdiv(rows, bm) * bm
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    scale, widened = _readable_steps(scale, layer, rows)
    operands = varying_alike([jnp.int32(layer)[None], x, codes, scale, table.astype(jnp.float32)])
    manual = jax.typeof(operands[0]).manual_axis_type
    given = {"read": read, "widened": widened, "group": group, "bits": bits}
    turned = transposed, transposed and not one_step
    y = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, steps=steps, turned=turned, **given),
        out_shape=jax.ShapeDtypeStruct((splits, padded, columns), dtype, manual_axis_type=manual),
        grid=(columns // bn, padded // bm, splits),
        in_specs=[
            pl.BlockSpec((1,), lambda n, m, s: (0,)),
            pl.BlockSpec((bm, depth), lambda n, m, s: (m, 0)),
            _columns_of(codes, bn, turned[0]),
            _columns_of(scale, bn, turned[1]),
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
    y = y.sum(0).astype(preferred) if splits > 1 else y[0]
    return y[:rows]


def _reader(decode, dtype, bits, lookup):
    """The function that decodes in the kernel, None for integer products, and its table."""
    if lookup and (bits is not None or dtype.name in ("int4", "uint4")):
        every = jnp.arange(2 ** (bits or 4))
        table = decode(every.astype(jnp.int32 if bits is not None else dtype))
        look_up = lambda codes, table_ref: table_ref[codes.astype(jnp.int32) & (table.size - 1)]
        return look_up, table
    return decode and (lambda codes, _: decode(codes)), jnp.zeros(1, jnp.float32)


def _columns_of(stack, columns, turned):
    """A block of columns of all layers."""
    layers, *whole = stack.shape
    block = (layers, columns, whole[1]) if turned else (layers, whole[0], columns)
    return pl.BlockSpec(block, lambda n, m, s: (0, n, 0) if turned else (0, 0, n))


def _readable_steps(scale, layer, rows):
    """Steps in a type that Triton has, and the function that widens them in the kernel."""
    if rows > _FEW_ROWS and scale.dtype != jnp.float32:
        # A float32 copy takes less time than widening them for each block.
        return step_value(layer_of(scale, layer))[None], step_value
    if scale.dtype == jnp.float8_e8m0fnu:
        return lax.bitcast_convert_type(layer_of(scale, layer), jnp.uint8)[None], power_of
    return scale, step_value


def tiles_of(rows, depth, group, bits, block, itemsize):
    """The `Tiles` for `rows` of `x`, whose elements have `itemsize` bytes."""
    runs = 1 if bits is None else layout(bits).runs
    width = (depth if bits is None else block) // runs
    # Many rows take long over a tile, few want many bytes on their way.
    least = LEAST_BYTES // itemsize
    most = max(least, (128 if rows <= 32 else 64) // runs)
    common = math.gcd(group, width)
    common = min(common & -common, most)
    return Tiles(max(common, least), runs, width, common >= least)


def _blocks(rows, depth, columns, tiles, integers=False):
    """Rows and columns of a block, the steps that it takes, and over how many programs."""
    bm = next((b for b in (16, 32, 64, 128) if rows <= b), 256)
    # Sums of integers take registers of their own, and no half of a block should be empty.
    if bm == 256 and (integers or 0 < rows % 256 <= 128):
        bm = 128
    bn = 2 * COLUMNS if bm >= 128 and columns % (2 * COLUMNS) == 0 else COLUMNS
    steps, splits = depth // (tiles.depth * tiles.runs), 1
    programs = columns // bn * pl.cdiv(rows, bm)
    busy = _BUSY if bm > 32 else 2 * _BUSY
    while programs * splits < busy and splits < _MAX_SPLITS and steps % 8 == 0:
        steps, splits = steps // 2, splits * 2
    return bm, bn, steps, splits


def _kernel(
    layer_ref,
    x_ref,
    codes_ref,
    scale_ref,
    table_ref,
    y_ref,
    *,
    read,
    widened,
    group,
    bits,
    tiles,
    steps,
    turned,
):
    """One block of the result, or of a part of its sum."""
    codes_at, x_at, scale_at, one_scale = _readers(
        layer_ref,
        x_ref,
        codes_ref,
        scale_ref,
        columns=y_ref.shape[1],
        widened=widened,
        group=group,
        tiles=tiles,
        turned=turned,
    )
    entries, first = jnp.arange(tiles.depth), pl.program_id(2) * steps
    grouped = group < x_ref.shape[1]
    words = 1 if bits is None else layout(bits).rows

    def step(i, sums):
        # Positions of a step whose runs are whole are where a run starts, otherwise each entry's.
        at = (first + i) * tiles.depth
        at = at if tiles.whole else at + entries
        block, within = lax.div(at, tiles.width), lax.rem(at, tiles.width)
        held = [codes_at((block * words + k) * tiles.width + within) for k in range(words)]
        runs = held if bits is None else codes_of_runs([w.astype(jnp.int32) for w in held], bits)
        for r, codes in enumerate(runs):
            at = (block * tiles.runs + r) * tiles.width + within
            if read is None:
                y = jnp.dot(x_at(at), codes.astype(jnp.int8), preferred_element_type=jnp.int32)
                sums += y.astype(jnp.float32) * scale_at(at) if grouped else y
                continue
            weight = read(codes, table_ref)
            weight = (weight * scale_at(at) if grouped else weight).astype(x_ref.dtype)
            sums += jnp.dot(x_at(at), weight, preferred_element_type=jnp.float32)
        return sums

    exact = read is None and not grouped
    none = jnp.zeros(y_ref.shape, jnp.int32 if exact else jnp.float32)
    sums = lax.fori_loop(0, steps, step, none).astype(jnp.float32)
    y_ref[...] = (sums if grouped else sums * one_scale()).astype(y_ref.dtype)


def _readers(layer_ref, x_ref, codes_ref, scale_ref, *, columns, widened, group, tiles, turned):
    """Functions that read codes, columns of `x` and scales at a position, and a scale for all."""
    place = lambda stack_ref: layer_ref[0] if stack_ref.shape[0] > 1 else 0
    of_codes, of_scale = place(codes_ref), place(scale_ref)
    rows, columns = jnp.arange(x_ref.shape[0])[:, None], jnp.arange(columns)[None]

    def part(stack_ref, layer, at, turned):
        if tiles.whole:
            whole = stack_ref[(layer, slice(None), at) if turned else (layer, at)]
            return whole.T if turned else whole
        if turned:
            return stack_ref[layer, columns.T, at[None]].T
        return stack_ref[layer, at[:, None], columns]

    def along(at):
        return pl.ds(pl.multiple_of(at, tiles.depth), tiles.depth)

    def codes_at(at):
        return part(codes_ref, of_codes, along(at) if tiles.whole else at, turned[0])

    def x_at(at):
        return x_ref[:, along(at)] if tiles.whole else x_ref[rows, at[None]]

    def scale_at(at):
        at = lax.div(at, group)
        return widened(part(scale_ref, of_scale, pl.ds(at, 1) if tiles.whole else at, turned[1]))

    return codes_at, x_at, scale_at, lambda: widened(scale_ref[of_scale])
