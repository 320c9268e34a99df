"""A product with a weight that takes more than a conversion to decode, as one kernel for TPU.

XLA fuses a conversion of integers into the operand of a matrix product; where decoding takes more
(a codebook, bit patterns with steps of small groups, words of 3 or 6 bits), it writes the dense
weight to memory once there are many rows. This kernel reads codes and steps once, decodes in VMEM
and feeds the matrix unit from there.

The grid runs over columns, then rows, then K, in blocks of 1024 at most. The first block of rows
decodes, in chunks of 256 by 256 within one stretch of code, so that the compiler can decode a chunk
while the matrix unit works on the one before; further blocks of rows find the decoded columns in
VMEM. A layer is read out of its stack. Mosaic loads 4-bit integers and 8-bit floats as they are.
Codes of four bits without a sign are looked up: `decode` is asked for sixteen levels, and a
permutation of lanes picks from them, in half of the time of nf4's selections. Signed ones are
integers, and converted: the whole kernel is 552 bundles then, and 1256 with the lookup (v5e).
Codes `[N, K]` are turned block by block as they come, in the type that they have.

A product moves `K N (bits + bits of a step / group) / 8` bytes of codes and steps, `2 M K` of `x`
for each 1024 columns, and `4 M N` of float32 result, for `2 M K N` operations; a dense bfloat16
weight would be `2 K N` bytes. For K = N = 8192 in microseconds, at 819 GB/s and 197 TFLOP/s (v5e)
and at 1640 GB/s and 918 TFLOP/s (v6e), with the instruction bundles that the compiler schedules,
one per cycle of 1.5 and 1.75 GHz (what the peaks make the clocks):

    weight                   nf4 / 128   mxfp4 / 32  mxfp8 / 32  mxfp6 / 32  int3 / 128  bfloat16
    megabytes                     35.7         35.7        69.2        52.4        27.3     134.2
    v5e, bytes                      44           44          85          64          33       164
    v5e, bundles, 8 rows           170          175         104         205          92
    v5e, bundles, 1024 rows        722          722         715         739         699  698 (MXU)
    v6e, bytes                      22           22          42          32          17        82
    v6e, bundles, 8 rows           131          134          87         174          75
    v6e, bundles, 1024 rows        261          266         228         301         222  150 (MXU)

So with few rows the limit is decoding, by the unit that permutes lanes for four bits and by the
vector unit otherwise, not memory; with many it is the matrix unit on v5e, and on v6e, whose matrix
unit is faster and vector unit is not, both. Waiting for memory is not in the bundles.
Steps are float32 in nf4 and int3 here, and 8 bits in mx formats: widening them takes 2 us of these.
Integers in groups of 128 meet those of `x` as such, a product of int8 per group, with its step: of
int4 that is 32 us with 8 rows, 73 with 128 and 453 with 1024 on v5e, and 27, 54 and 292 on v6e.
To turn codes takes as many bundles more for any number of rows: of eight bits 59 us, six 55, four
51, three 23 (v5e), and of four 39 (v6e).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_compress.kernels.decoded import codes_of_runs
from jaxopt_compress.kernels.forms import varying_alike
from jaxopt_compress.numerics.packing import layout
from jaxopt_compress.numerics.steps import step_value

# Blocks of rows, columns and K. A block of rows is as large as the accumulator may well be: each
# reads x once more per block of columns, but not the weight.
_ROWS, _COLUMNS, _DEPTH = 1024, 1024, 1024
# A chunk, a divisor of a block, is decoded at a time: small enough for registers, deep enough for
# the matrix unit. Steps are read by rows, which Mosaic does for at least 256 columns.
CHUNK_DEPTH, CHUNK_COLUMNS = 256, 256
_LANES = 128
# Of VMEM's 128 MB, what decoded columns may take, and what the compiler gets for spilled registers.
MAX_DECODED_BYTES, _SPILLED_BYTES = 48 * 2**20, 16 * 2**20


def product(x, codes, scale, layer, *, interpret, **given):
    """The kernel, one for each matrix of a batch; keywords as for `tpu_dots.decoded_dot`.

    Codes and steps have an axis of layers in front, or of size 1. Without `decode` codes meet those
    of `x` as integers, and are read again for each block of rows.
    """
    if x.ndim > 2:
        one = functools.partial(product, interpret=interpret, **given)
        return jax.vmap(one, (0, 1, 1, None))(x, codes, scale, layer)
    decode, group, preferred = given["decode"], given["group"], jnp.dtype(given["preferred"])
    (rows, depth), bits, turned = x.shape, given["bits"], given["transposed"]
    _, height, columns = codes.shape
    if turned:
        height, columns = columns, height
    groups = depth // group
    turned_steps = turned and groups >= _LANES
    if turned and not turned_steps:  # XLA stores so few to a row by columns.
        scale = scale.mT
    bm, bn, bk = _blocks(rows, depth, columns, x.dtype.itemsize, unit_of_depth(bits, turned))
    grid = (pl.cdiv(columns, bn), pl.cdiv(rows, bm), depth // bk)
    stored = bk * height // depth
    # Rows of steps are read one by one, which Mosaic does in float32 only.
    scratch = {"sums": ((bm, bn), jnp.float32), "steps": ((groups, bn), jnp.float32)}
    if turned:
        scratch["codes"] = ((stored, bn), codes.dtype)
    if keeps := decode is not None and grid[1] > 1:
        scratch["decoded"] = ((depth, bn), x.dtype)
    read, table = _reader(decode, codes.dtype, bits, given["block"])
    # Later blocks of rows do not read codes: naming the same block again moves nothing.
    block = lambda m, k: jnp.where(m == 0, k, grid[2] - 1) if keeps else k
    code_bits = 4 if codes.dtype.name.endswith("int4") else 8
    column_bytes = height * code_bits // 8, groups * scale.dtype.itemsize
    operands = varying_alike([jnp.int32(layer)[None], x, codes, scale, table[None]])
    manual = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        functools.partial(
            _kernel, read=read, group=group, turned=turned_steps, scratch=tuple(scratch)
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), preferred, manual_axis_type=manual),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((bm, bk), lambda n, m, k, _: (m, k)),
                _in_layer(codes, (stored, bn), block, turned),
                _in_layer(scale, (groups, bn), lambda m, k: 0, turned_steps),
                pl.BlockSpec((1, _LANES), lambda n, m, k, _: (0, 0)),
            ],
            out_specs=pl.BlockSpec((bm, bn), lambda n, m, k, _: (m, n)),
            scratch_shapes=[pltpu.VMEM(*kind) for kind in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem((bm, bn, bk), depth, x.dtype, preferred, column_bytes, scratch),
        ),
        cost_estimate=_cost(x, columns, grid[0], sum(column_bytes), preferred),
        interpret=interpret,
        name="decoded_dot",
    )(*operands)


def _reader(decode, dtype, bits, block):
    """The function that decodes in the kernel, None for integer products, and its table."""
    table = jnp.zeros(_LANES, jnp.float32)
    if decode is None:
        return None, table
    if dtype == jnp.uint4:
        return _look_up, table.at[:16].set(decode(jnp.arange(16, dtype=jnp.int32).astype(dtype)))
    if bits is not None:
        return lambda words, _: decode(_unpack(words, bits, block)), table
    return lambda codes, _: decode(codes), table


def _in_layer(stack, shape, at, turned):
    """A block of one layer, `at(m, k)` along K."""
    height, columns = shape

    def place(n, m, k, layer_ref):
        layer, at_mk = layer_ref[0] if stack.shape[0] > 1 else 0, at(m, k)
        return (layer, n, at_mk) if turned else (layer, at_mk, n)

    return pl.BlockSpec((None, columns, height) if turned else (None, height, columns), place)


def _vmem(blocks, depth, dtype, preferred, column_bytes, scratch):
    """Bytes of VMEM: windows twice, while one is read the other is written; scratch once."""
    (bm, bn, bk), (codes, steps) = blocks, column_bytes
    windows = bm * bk * dtype.itemsize + bm * bn * preferred.itemsize
    windows += bn * (codes * bk // depth + steps)
    kept = sum(math.prod(shape) * jnp.dtype(of).itemsize for shape, of in scratch.values())
    return 2 * windows + kept + _SPILLED_BYTES


def _cost(x, columns, reads, column_bytes, preferred):
    """Operations and bytes; `x` is read once for each block of columns."""
    rows, depth = x.shape
    row_bytes = reads * depth * x.dtype.itemsize + columns * preferred.itemsize
    moved = columns * column_bytes + rows * row_bytes
    flops = 2 * rows * depth * columns
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def unit_of_depth(bits, transposed):
    """The number that divides K of a block; transposed words need whole registers along it."""
    return max(CHUNK_DEPTH, 8 * _LANES // math.gcd(bits, 8)) if bits and transposed else CHUNK_DEPTH


def _blocks(rows, depth, columns, itemsize, unit):
    """Rows, columns and K of a block."""
    # Even shares, so that the last block holds little beyond the edge.
    even = lambda size, most, of: pl.cdiv(size, pl.cdiv(size, most) * of) * of
    bm, bn = even(rows, _ROWS, 32 // itemsize), even(columns, _COLUMNS, CHUNK_COLUMNS)
    while rows > bm and depth * bn * itemsize > MAX_DECODED_BYTES:
        bn -= CHUNK_COLUMNS
    bk = next(b for b in range(_DEPTH, 0, -unit) if depth % b == 0)
    return bm, bn, bk


def _kernel(_, x_ref, codes_ref, scale_ref, table_ref, y_ref, *refs, read, group, turned, scratch):
    """One block; "decoded" is where columns stay, if there are several blocks of rows."""
    own = dict(zip(scratch, refs, strict=True))
    sum_ref, wide_ref, kept_ref = own["sums"], own["steps"], own.get("decoded")
    held_ref = own.get("codes", codes_ref)
    m, k = pl.program_id(1), pl.program_id(2)
    chunks = x_ref.shape[1] // CHUNK_DEPTH
    by_integers, by_levels, by_kept = _products(
        x_ref, held_ref, table_ref, wide_ref, kept_ref, read=read, group=group, first=k * chunks
    )

    def multiply(product):
        def step(j, _):
            for start in range(0, y_ref.shape[1], CHUNK_COLUMNS):
                columns = pl.ds(start, CHUNK_COLUMNS)
                sum_ref[:, columns] += product(j, columns)

        lax.fori_loop(0, chunks, step, None)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when((m == 0) & (k == 0))
    def _():
        steps = step_value(scale_ref[...])
        wide_ref[...] = steps.T if turned else steps

    def multiply_codes():
        if held_ref is not codes_ref:
            held_ref[...] = codes_ref[...].T
        multiply(by_integers if read is None else by_levels)

    if kept_ref is None:
        multiply_codes()
    else:
        pl.when(m == 0)(multiply_codes)
        pl.when(m > 0)(lambda: multiply(by_kept))

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _products(x_ref, held_ref, table_ref, wide_ref, kept_ref, *, read, group, first):
    """Products of chunk `j` of this block: by integers, by levels, and by columns decoded before.

    The block begins at chunk `first` of K.
    """
    chunks = x_ref.shape[1] // CHUNK_DEPTH
    height = min(group, CHUNK_DEPTH)  # The rows of a chunk that share a step.
    parts = [slice(start, start + height) for start in range(0, CHUNK_DEPTH, height)]

    def scaled(values, j, columns):
        i = first + j
        at = i * len(parts) if len(parts) > 1 else lax.div(i, jnp.int32(group // CHUNK_DEPTH))
        steps = [wide_ref[pl.ds(at + n, 1), columns] for n in range(len(parts))]
        return [value * step for value, step in zip(values, steps, strict=True)]

    def codes_at(j, columns):
        return held_ref[_at(j, held_ref.shape[0] // chunks), columns]

    def by_integers(j, columns):
        x, codes = x_ref[:, _at(j)], codes_at(j, columns).astype(jnp.int8)
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.int32)
        return sum(
            scaled([dot(x[:, at], codes[at]).astype(jnp.float32) for at in parts], j, columns)
        )

    def by_levels(j, columns):
        levels = read(codes_at(j, columns), table_ref)
        weight = jnp.concatenate(scaled([levels[at] for at in parts], j, columns))
        weight = weight.astype(x_ref.dtype)
        if kept_ref is not None:
            kept_ref[_at(first + j), columns] = weight
        return jnp.dot(x_ref[:, _at(j)], weight, preferred_element_type=jnp.float32)

    def by_kept(j, columns):
        weight = kept_ref[_at(first + j), columns]
        return jnp.dot(x_ref[:, _at(j)], weight, preferred_element_type=jnp.float32)

    return by_integers, by_levels, by_kept


def _at(chunk, height=CHUNK_DEPTH):
    return pl.ds(pl.multiple_of(chunk * height, height), height)


def _look_up(codes, table_ref):
    """Picks from the lanes of a table, a register's width of columns at a time."""
    table = jnp.broadcast_to(table_ref[...], (codes.shape[0], _LANES))
    pick = lambda at: jnp.take_along_axis(table, at, axis=1, mode="promise_in_bounds")
    parts = jnp.split(codes.astype(jnp.int32), codes.shape[1] // _LANES, axis=1)
    return jnp.concatenate([pick(part) for part in parts], axis=1)


def _unpack(words, bits, block):
    """Codes from planar words, as int32: shifts of whole registers."""
    how = layout(bits)
    rows = jnp.split(words.astype(jnp.int32), words.shape[0] // (block // how.runs))
    codes = []
    for start in range(0, len(rows), how.rows):
        codes += codes_of_runs(rows[start : start + how.rows], bits)
    return jnp.concatenate(codes)
