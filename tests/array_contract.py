"""Examples of every compressed array; whatever joins `LEAVES` is held to the contract."""

import math
import pickle
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import scipy.linalg

from jaxopt_compress.arrays import (
    CodebookArray,
    InputQuantizedArray,
    LowRankArray,
    PermutedArray,
    QuantizedArray,
    RotatedArray,
    ScaledArray,
    SumArray,
    TensorTrainArray,
    TuckerArray,
)
from jaxopt_compress.arrays.codebook import code_bits, code_dtype
from jaxopt_compress.arrays.sparse import sparse_nm, sparse_rows
from jaxopt_compress.numerics.codebooks import NF4
from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.numerics.packing import pack
from jaxopt_compress.storage import load, save

STACK = 8


class Example(NamedTuple):
    """A leaf and what it has to mean.

    Attributes:
        leaf: The compressed array.
        formula: Its dense array from its float fields, in the order of the tree, in plain jnp.
    """

    leaf: Any
    formula: Callable[..., jax.Array]


class Leaf(NamedTuple):
    """One kind of compressed array.

    Attributes:
        name: Unique name, which is also the test's id.
        build: Makes an example; a stack adds leading axes.
        nbytes: Bytes in a file without a stack, worked out by hand.
        resident: Bytes in memory on a CPU without a stack, worked out by hand.
        splits: Axes that eight devices can split.
        whole: Axes that cannot be split in this form.
        exact: Whether a part of the array has the same bits as that part computed alone. A matrix
            product sums in an order that depends on its shape, so a product of factors has not.
    """

    name: str
    build: Callable[[np.random.Generator, tuple[int, ...]], Example]
    nbytes: int
    resident: int
    splits: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    exact: bool = True

    def example(self, stack: tuple[int, ...] = (), seed: int = 0) -> Example:
        """The example with other values per seed, and the same structure."""
        return self.build(np.random.default_rng(seed), stack)


def normal(rng, *shape, dtype="float32"):
    """Normal values, some of them -0.0."""
    x = rng.normal(size=shape)
    x.reshape(-1)[::7] = -0.0
    return jnp.asarray(x, "float32").astype(dtype)


def quantized(shape, fmt, axis, scale_shape, *, dtype="float32", keep=None, **static):
    """Codes in the dtype of their format, in words with ``block``, under a mask with ``keep``."""
    of = format_of(fmt)
    bits, signed = of.bits, fmt.startswith("int")

    def build(rng, stack):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
        if jnp.issubdtype(of.dtype, jnp.floating):
            high = 2 ** (bits - 1) - 8  # no NaNs
        raw = rng.integers(low, high, (*stack, *shape), np.int16)
        raw = raw.astype(np.int8 if signed else np.uint8)
        steps, scale = _steps(rng, (*stack, *scale_shape), static.get("steps", "float32"))
        zero = None
        if static.get("asymmetric"):
            zero = jnp.asarray(rng.integers(low, high, scale.shape), jnp.int8)
        group, block, tile = (static.get(k) for k in ("group", "block", "tile"))
        stored = jnp.asarray(raw)
        if jnp.issubdtype(of.dtype, jnp.floating):
            stored = jax.lax.bitcast_convert_type(stored, of.dtype)
        else:
            stored = stored.astype(of.dtype)
        mask = np.ones(raw.shape, bool)
        if block is not None:
            stored = pack(jnp.asarray(raw), bits, axis, block)
        if keep is not None:
            mask = keep.mask(rng, stack)
            stored = keep.store(stored, mask)

        def formula(*scale):
            wide = [steps(*scale), jnp.zeros(()) if zero is None else zero.astype(jnp.float32)]
            for at, size in ((axis, group), tile or (None, None)):
                if size is not None:
                    # The last group may be shorter.
                    take = np.arange(raw.shape[at]) // size
                    wide = [jnp.take(x, take, axis=at) if x.ndim else x for x in wide]
            levels = jnp.where(mask, _values(raw, fmt) - wide[1], 0.0)
            return (levels * wide[0]).astype(dtype)

        leaf = QuantizedArray(stored, scale, zero, jnp.dtype(dtype), fmt, axis, group, block, tile)
        return Example(leaf, formula)

    return build


def _values(raw, fmt):
    """The levels of codes, from another source than the package's."""
    if fmt == "nf4":
        return np.asarray(NF4.levels, np.float32)[raw]
    same = {"mxfp4": "float4_e2m1fn", "nvfp4": "float4_e2m1fn", "mxfp6": "float6_e2m3fn"}
    kind = same.get(fmt, fmt)
    if kind.startswith("float"):
        return raw.view(getattr(ml_dtypes, kind)).astype(np.float32)
    return raw.astype(np.float32)


def _steps(rng, shape, kind):
    """``(function of the float fields to float32 steps, stored steps)``."""
    floats = jnp.asarray(rng.uniform(0.01, 2.0, shape), jnp.float32)
    if kind == "float32":
        return lambda scale: scale, floats
    if kind == "bfloat16":
        return lambda scale: scale.astype(jnp.float32), floats.astype(kind)
    raw = rng.integers(120, 134, shape, np.uint8)
    if kind == "float8_e8m0fnu":
        stored = jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.float8_e8m0fnu)
        return lambda: 2.0 ** (raw.astype(np.float32) - 127), stored
    raw = rng.integers(8, 120, shape, np.uint8)
    codes = jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.float8_e4m3fn)
    outer = floats[..., :1, :1]
    stored = QuantizedArray(codes, outer, None, jnp.dtype("float32"), "float8_e4m3fn", None)
    return lambda outer: raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * outer, stored


def codebook(clusters, books, *, vector=1, dtype="float32", held="float32", **stored):
    """Codes of ``(K, N)`` along the first axis, and books that are shared along axes of size 1."""
    block, keep = stored.get("block"), stored.get("keep")

    def build(rng, stack):
        raw = rng.integers(0, clusters, (*stack, K // vector, N), np.uint16)
        shape = (*stack, books[0] * clusters * vector, books[1])
        centroids = normal(rng, *shape, dtype=held)
        codes = jnp.asarray(raw).astype(code_dtype(clusters))
        mask = np.ones((*stack, K, N), bool)
        if block is not None:
            codes = pack(jnp.asarray(raw.astype(np.uint8)), code_bits(clusters), -2, block)
        if keep is not None:
            mask = keep.mask(rng, stack)
            codes = keep.store(codes, mask)
        # Entry ``k`` is part ``k % vector`` of a vector of group ``k // (K / groups)``.
        k = np.arange(K)[:, None]
        at = (k // (K // books[0]) * clusters + np.repeat(raw, vector, -2)) * vector + k % vector

        def formula(centroids):
            table = jnp.broadcast_to(centroids, (*stack, shape[-2], N))
            values = jnp.take_along_axis(table, jnp.asarray(at, jnp.int32), -2)
            return jnp.where(mask, values.astype("float32"), 0).astype(dtype)

        leaf = CodebookArray(codes, centroids, jnp.dtype(dtype), clusters, -2, vector, block)
        return Example(leaf, formula)

    return build


class Rows(NamedTuple):
    """An unstructured mask: ``kept`` entries in the first row of a stack, fewer in the others."""

    shape: tuple[int, ...]
    kept: int

    def mask(self, rng, stack):
        rows, size = math.prod(stack), math.prod(self.shape)
        mask = np.zeros((rows, size), bool)
        for i in range(rows):
            mask[i, rng.permutation(size)[: max(self.kept - 9 * i, 0)]] = True
        return mask.reshape(*stack, *self.shape)

    def store(self, dense, mask):
        return sparse_rows(dense, jnp.asarray(mask), len(self.shape))

    def place(self, dense, mask, values):
        rows = mask.reshape(-1, math.prod(self.shape))
        values = values.reshape(len(rows), values.shape[-1])
        at, column = np.nonzero(rows)
        slot = np.concatenate([np.arange(row.sum()) for row in rows]).astype(int)
        flat = dense.reshape(rows.shape).at[at, column].set(values[at, slot])
        return flat.reshape(mask.shape)


class Groups(NamedTuple):
    """A mask of at most ``n`` of ``m`` entries along ``axis``; some groups keep fewer."""

    shape: tuple[int, ...]
    n: int
    m: int
    axis: int

    def mask(self, rng, stack):
        mask = np.zeros((*stack, *self.shape), bool)
        lines = np.moveaxis(mask, self.axis, -1)
        for index in np.ndindex(lines.shape[:-1]):
            for start in range(0, lines.shape[-1], self.m):
                order = start + rng.permutation(min(self.m, lines.shape[-1] - start))
                lines[index][order[: rng.integers(self.n, endpoint=True)]] = True
        return mask

    def store(self, dense, mask):
        return sparse_nm(dense, jnp.asarray(mask), self.n, self.m, self.axis)

    def place(self, dense, mask, values):
        at = mask.ndim + self.axis
        index, source = np.nonzero(mask), []
        seen = {}
        for entry in zip(*index, strict=True):
            group = (*entry[:at], entry[at] // self.m, *entry[at + 1 :])
            seen[group] = slot = seen.get(group, -1) + 1
            source.append((*entry[:at], group[at] * self.n + slot, *entry[at + 1 :]))
        return dense.at[index].set(values[tuple(np.array(source).T)])


def sparse(keep, dtype="float32"):
    """Float values under a mask."""

    def build(rng, stack):
        mask = keep.mask(rng, stack)
        leaf = keep.store(normal(rng, *stack, *keep.shape, dtype=dtype), mask)
        return Example(leaf, lambda v: keep.place(jnp.zeros(mask.shape, v.dtype), mask, v))

    return build


def low_rank(left, right, rank, *, dtype="float32", factor="float32"):
    """Two dense factors."""

    def build(rng, stack):
        u = normal(rng, *stack, *left, *(1,) * (len(right) - 1), rank, dtype=factor)
        v = normal(rng, *stack, *(1,) * (len(left) - 1), rank, *right, dtype=factor)
        leaf = LowRankArray(u, v, jnp.dtype(dtype), len(right))
        return Example(leaf, lambda u, v: multiply(u, v, stack, left, right).astype(dtype))

    return build


def permuted(left, right, rank):
    """Two factors whose left axis lies between the right ones: ``[right, left, right]``."""
    plain = low_rank(left, right, rank)

    def build(rng, stack):
        leaf, formula = plain(rng, stack)
        moved = lambda w: jnp.swapaxes(w, -3, -2)
        return Example(PermutedArray(leaf, (-2, -3, -1)), lambda u, v: moved(formula(u, v)))

    return build


def multiply(u, v, stack, left, right):
    """The product of two factors as one einsum of matrices."""
    u = u.reshape(*stack, -1, u.shape[-1]).astype(jnp.float32)
    v = v.reshape(*stack, u.shape[-1], -1).astype(jnp.float32)
    w = jnp.einsum("...kr,...rn->...kn", u, v, precision="highest")
    return w.reshape(*stack, *left, *right)


def quantized_factors(rng, stack):
    """Factors of 8 and of 4 bits."""
    u, pu = quantized((K, 3), "int8", -2, (1, 3))(rng, stack)
    v, pv = quantized((3, N), "int4", -2, (1, N))(rng, stack)
    leaf = LowRankArray(u, v, jnp.dtype("float32"))
    return Example(leaf, lambda a, b: multiply(pu(a), pv(b), stack, (K,), (N,)))


def with_inputs(build):
    """A weight that rounds what it meets; steps of that are no part of the array."""

    def wrapped(rng, stack):
        leaf, formula = build(rng, stack)
        whole = InputQuantizedArray(leaf, jnp.full((*stack, 1, 1), 0.5), "int8")
        return Example(whole, lambda *fields: formula(*fields[:-1]))

    return wrapped


def with_factors(build, shape):
    """An array whose inputs have factors."""

    def wrapped(rng, stack):
        leaf, formula = build(rng, stack)
        factors = jnp.asarray(rng.uniform(0.5, 2.0, (*stack, *shape)), jnp.float32)
        dense = lambda *fields: (formula(*fields[:-1]).astype(jnp.float32) * fields[-1]).astype(
            leaf.dtype
        )
        return Example(ScaledArray(leaf, factors), dense)

    return wrapped


def tucker(rng, stack):
    """A kernel ``[3, 3, 16, 8]`` by way of 4 and 2 channels."""
    sizes = (1, 1, 16, 4), (3, 3, 4, 2), (1, 1, 2, 8)
    parts = [normal(rng, *stack, *size) for size in sizes]

    def formula(first, core, last):
        how = "...ia,...hwab,...bo->...hwio"
        first, last = (x.reshape(*stack, *x.shape[-2:]) for x in (first, last))
        return jnp.einsum(how, first, core, last, precision="highest")

    return Example(TuckerArray(*parts, jnp.dtype("float32"), (-2, -1)), formula)


def cp(rng, stack):
    """A kernel ``[3, 3, 16, 8]`` by way of 4 channels that the window meets one by one."""
    sizes = (1, 1, 16, 4), (3, 3, 1, 4), (1, 1, 4, 8)
    parts = [normal(rng, *stack, *size) for size in sizes]

    def formula(first, core, last):
        first, last = (x.reshape(*stack, *x.shape[-2:]) for x in (first, last))
        core = core.reshape(*stack, 3, 3, 4)
        how = "...ia,...hwa,...ao->...hwio"
        return jnp.einsum(how, first, core, last, precision="highest")

    return Example(TuckerArray(*parts, jnp.dtype("float32"), (-2, -1)), formula)


def tensor_train(rows, columns, ranks, cut=(0, 0)):
    """Cores of digits; the dense array without its last rows and columns."""
    ends = (1, *ranks, 1)
    sizes = list(zip(ends, rows, columns, ends[1:], strict=False))

    def build(rng, stack):
        cores = tuple(normal(rng, *stack, r * n, m * s) for r, n, m, s in sizes)

        def formula(*cores):
            names, parts = "abcd", []
            for core, size in zip(cores, sizes, strict=True):
                parts.append(core.reshape(*stack, *size))
            letters = [
                f"...{names[k]}{'ijk'[k]}{'xyz'[k]}{names[k + 1]}" for k in range(len(parts))
            ]
            out = "..." + "ijk"[: len(parts)] + "xyz"[: len(parts)]
            w = jnp.einsum(f"{','.join(letters)}->{out}", *parts, precision="highest")
            w = w.reshape(*stack, math.prod(rows), math.prod(columns))
            return w[..., : w.shape[-2] - cut[0], : w.shape[-1] - cut[1]]

        leaf = TensorTrainArray(cores, jnp.dtype("float32"), rows[1:], columns[1:], cut)
        return Example(leaf, formula)

    return build


def summed(*builds):
    """The sum of arrays in several forms."""

    def build(rng, stack):
        parts = [build(rng, stack) for build in builds]

        def formula(*fields):
            fields, total = iter(fields), 0.0
            for leaf, dense in parts:
                own = [next(fields) for _ in float_fields(leaf)]
                total = total + dense(*own).astype(jnp.float32)
            return total.astype(parts[0].leaf.dtype)

        return Example(SumArray(tuple(leaf for leaf, _ in parts)), formula)

    return build


def rotated(build, axis):
    """An array that was rotated along an axis; by transforms of scipy's, which are symmetric."""

    def wrapped(rng, stack):
        leaf, formula = build(rng, stack)
        size = leaf.shape[axis]
        shape = [size if d == axis else 1 for d in range(len(stack) - leaf.ndim, 0)]
        signs = jnp.asarray(rng.choice([-1, 1], (*stack, *shape)), jnp.int8)

        def dense(*fields):
            x = jnp.moveaxis(formula(*fields), axis, -1)
            x = x.reshape(*x.shape[:-1], size // 2, 2)
            for d, n in ((-2, size // 2), (-1, 2)):
                rows, total = scipy.linalg.hadamard(n).astype(np.float32), 0.0
                for j, row in enumerate(rows):
                    part = jnp.take(x, jnp.array([j]), axis=d)
                    total = total + part * row.reshape(-1, *(1,) * (-1 - d))
                x = total
            turned = x.reshape(*x.shape[:-2], size) * np.float32(size**-0.5)
            return (jnp.moveaxis(turned, -1, axis) * signs).astype(leaf.dtype)

        return Example(RotatedArray(leaf, signs, (axis,)), dense)

    return wrapped


K, N = 64, 8
ROWS, TWO = Rows((K, N), 172), Groups((K, N), 2, 4, -2)
CHANNEL, GROUPED, BOTH = (1, N), (8, N), (-2, -1)
HALF = "bfloat16"

LEAVES = [
    Leaf("int8", quantized((K, N), "int8", -2, CHANNEL), 512 + 32, 512 + 32, BOTH),
    Leaf("int8_inputs", with_inputs(quantized((K, N), "int8", -2, CHANNEL)), 548, 548, BOTH),
    Leaf(
        "int8_scaled",
        with_factors(quantized((K, N), "int8", -2, CHANNEL), (K, 1)),
        512 + 32 + 256,
        512 + 32 + 256,
        BOTH,
    ),
    Leaf(
        "int8_rotated",
        rotated(quantized((K, N), "int8", -2, CHANNEL), -2),
        512 + 32 + 64,
        512 + 32 + 64,
        (-1,),
    ),
    Leaf("int8_tensor", quantized((K, N), "int8", -2, (1, 1), dtype=HALF), 512 + 4, 516, BOTH),
    Leaf("int8_scalar", quantized((), "int8", None, ()), 1 + 4, 5),
    Leaf("int8_qkv", quantized((16, 8, 4), "int8", -3, (1, 8, 4)), 512 + 128, 640, (-3, -2)),
    Leaf("int4", quantized((K, N), "int4", -2, CHANNEL, dtype=HALF), 256 + 32, 512 + 32, BOTH),
    Leaf(
        "int4_grouped_asymmetric",
        quantized((K, N), "int4", -2, GROUPED, group=8, asymmetric=True),
        256 + 256 + 64,
        512 + 256 + 64,
        BOTH,
    ),
    Leaf("int8_last", quantized((K, N), "int8", -1, (K, 2), group=4), 512 + 512, 1024, (-2,)),
    Leaf("int8_one_group", quantized((K, N), "int8", -2, CHANNEL, group=K), 512 + 32, 544, BOTH),
    Leaf(
        "int2",
        quantized((K, N), "int2", -2, GROUPED, dtype="float16", group=8, block=8, asymmetric=True),
        128 + 256 + 64,
        128 + 256 + 64,
        BOTH,
    ),
    Leaf("int2_unpacked", quantized((K, N), "int2", -2, CHANNEL), 128 + 32, 512 + 32, BOTH),
    Leaf(
        "int4_planar", quantized((K, N), "int4", -1, (K, 1), block=8), 256 + 256, 512, (-2,), (-1,)
    ),
    Leaf("int1", quantized((K, N), "int1", -2, CHANNEL, block=K), 64 + 32, 96, (-1,), (-2,)),
    Leaf("uint3", quantized((K, N), "uint3", -2, CHANNEL, block=K), 192 + 32, 224, (-1,), (-2,)),
    Leaf("nf4", quantized((K, N), "nf4", -2, GROUPED, group=8), 256 + 256, 512 + 256, BOTH),
    Leaf(
        "float8_tiles",
        quantized((K, N), "float8_e4m3fn", -2, (8, 2), group=8, tile=(-1, 4), steps=HALF),
        512 + 32,
        512 + 32,
        (-2,),
    ),
    Leaf(
        "mxfp4",
        quantized((K, N), "mxfp4", -2, GROUPED, group=8, steps="float8_e8m0fnu", dtype=HALF),
        256 + 64,
        512 + 64,
        BOTH,
    ),
    Leaf(
        "mxfp6",
        quantized((K, N), "mxfp6", -2, GROUPED, group=8, block=8, steps="float8_e8m0fnu"),
        384 + 64,
        384 + 64,
        BOTH,
    ),
    Leaf(
        "nvfp4",
        quantized((K, N), "nvfp4", -2, GROUPED, group=8, steps="float8_e4m3fn"),
        256 + 64 + 4,
        512 + 64 + 4,
        BOTH,
    ),
    Leaf(
        "int5_ragged",
        quantized((30, N), "int5", -2, (4, N), group=8),
        150 + 128,
        240 + 128,
        (-1,),
        (-2,),
    ),
    Leaf("codebook", codebook(16, (1, 1)), 256 + 64, 512 + 64, BOTH),
    Leaf(
        "codebook_channels",
        codebook(5, (1, N), dtype=HALF, held="float16", block=K),
        192 + 80,
        192 + 80,
        (-1,),
        (-2,),
    ),
    Leaf("codebook_vectors", codebook(32, (2, 1), vector=2), 160 + 512, 256 + 512, (-1,)),
    Leaf("codebook_rows", codebook(16, (1, 1), keep=ROWS), 86 + 128, 172 + 128, (), BOTH),
    Leaf("nf4_rows", quantized((K, N), "nf4", -2, CHANNEL, keep=ROWS), 86 + 96, 172 + 96, (), BOTH),
    Leaf("rows", sparse(ROWS), 688 + 64, 688 + 64, (), BOTH),
    Leaf("rows_empty", sparse(Rows((K, N), 0), HALF), 0, 0, (), BOTH),
    Leaf("rows_few", sparse(Rows((K, N), 30)), 120 + 30, 150, (), BOTH),
    Leaf("rows_fewer", sparse(Rows((K, N), 4)), 16 + 8, 24, (), BOTH),
    Leaf("2:4", sparse(TWO), 1024 + 64, 1024 + 64, BOTH),
    Leaf("1:4", sparse(Groups((K, N), 1, 4, -1), HALF), 256 + 64, 320, (-2,)),
    Leaf("2:4_ragged", sparse(Groups((30, N), 2, 4, -2)), 512 + 32, 544, (-1,), (-2,)),
    Leaf("low_rank", low_rank((K,), (N,), 3), 768 + 96, 864, BOTH, exact=False),
    Leaf("low_rank_qkv", low_rank((16,), (8, 4), 3), 192 + 384, 576, (-3, -2), exact=False),
    Leaf("low_rank_permuted", permuted((16,), (8, 4), 3), 192 + 384, 576, (-2, -3), exact=False),
    Leaf(
        "low_rank_out",
        low_rank((8, 4), (16,), 3, dtype=HALF, factor=HALF),
        192 + 96,
        288,
        (-3, -1),
        exact=False,
    ),
    Leaf(
        "int8_rows", quantized((K, N), "int8", -2, CHANNEL, keep=ROWS), 172 + 64 + 32, 268, (), BOTH
    ),
    Leaf(
        "int4_rows_asymmetric",
        quantized((K, N), "int4", -2, CHANNEL, keep=ROWS, asymmetric=True),
        86 + 64 + 32 + 8,
        172 + 64 + 32 + 8,
        (),
        BOTH,
    ),
    Leaf(
        "int4_2:4",
        quantized((K, N), "int4", -2, GROUPED, keep=TWO, group=8, dtype=HALF),
        128 + 64 + 256,
        256 + 64 + 256,
        BOTH,
    ),
    Leaf(
        "int8_2:4_asymmetric",
        quantized((K, N), "int8", -2, CHANNEL, keep=TWO, asymmetric=True),
        256 + 64 + 32 + 8,
        256 + 64 + 32 + 8,
        BOTH,
    ),
    Leaf(
        "quantized_factors",
        quantized_factors,
        192 + 12 + 12 + 32,
        192 + 12 + 24 + 32,
        BOTH,
        exact=False,
    ),
    Leaf("tucker", tucker, 4 * (64 + 72 + 16), 4 * (64 + 72 + 16), BOTH, exact=False),
    Leaf("cp", cp, 4 * (64 + 36 + 32), 4 * (64 + 36 + 32), BOTH, exact=False),
    Leaf(
        "tensor_train",
        tensor_train((8, 4, 2), (8, 1, 1), (3, 2)),
        4 * (192 + 24 + 4),
        4 * (192 + 24 + 4),
        BOTH,
        exact=False,
    ),
    Leaf(
        "tensor_train_cut",
        tensor_train((8, 8), (4, 2), (3,), cut=(4, 1)),
        4 * (96 + 48),
        4 * (96 + 48),
        (),
        BOTH,
        exact=False,
    ),
    Leaf(
        "rows_and_low_rank",
        summed(sparse(ROWS), low_rank((K,), (N,), 3)),
        688 + 64 + 864,
        688 + 64 + 864,
        (),
        BOTH,
        exact=False,
    ),
    Leaf(
        "int4_and_low_rank_and_2:4",
        summed(
            quantized((K, N), "int4", -2, GROUPED, group=8, dtype=HALF),
            low_rank((K,), (N,), 3, dtype=HALF, factor=HALF),
            sparse(TWO, HALF),
        ),
        256 + 256 + 432 + 512 + 64,
        512 + 256 + 432 + 512 + 64,
        BOTH,
        exact=False,
    ),
]


def reflatten(leaf):
    """Through its list of arrays."""
    leaves, treedef = jax.tree.flatten(leaf)
    return jax.tree.unflatten(treedef, leaves)


def through_files(leaf):
    """Saved, and loaded without a template."""
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/leaf", leaf)
        return load(f"{folder}/leaf")


# Ways there and back that keep every bit; a storage form joins with a line.
ROUND_TRIPS = {
    "flatten": reflatten,
    "pickle": lambda leaf: pickle.loads(pickle.dumps(leaf)),
    "device_get": lambda leaf: jax.device_put(jax.device_get(leaf)),
    "checkpoint": through_files,
}


def float_fields(leaf):
    """The arrays within a leaf that gradients can move, in the order of the tree."""
    wide = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
    return [x for x in jax.tree.leaves(leaf) if wide(x)]


def assert_same_bits(got, want):
    """The dtype, the shape and every bit, the sign of zero included."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.tobytes() != want.tobytes():
        wrong = np.flatnonzero((got != want) | (np.signbit(got) != np.signbit(want)))
        raise AssertionError(f"{len(wrong)} of {got.size} entries differ, the first at {wrong[:1]}")
