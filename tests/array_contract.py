"""Examples of every compressed array; whatever joins `LEAVES` is held to the contract.

What makes an example, and the contract, are in `tests/arrays/`.
"""

import pickle
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxopt_compress.storage import load, save
from tests.arrays.coded import codebook, quantized
from tests.arrays.example import Example, K, N
from tests.arrays.factored import cp, low_rank, permuted, quantized_factors, tensor_train, tucker
from tests.arrays.masked import Groups, Rows, sparse
from tests.arrays.wrapped import rotated, summed, with_factors, with_inputs

STACK = 8


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


def assert_same_bits(got, want):
    """The dtype, the shape and every bit, the sign of zero included."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.tobytes() != want.tobytes():
        wrong = np.flatnonzero((got != want) | (np.signbit(got) != np.signbit(want)))
        raise AssertionError(f"{len(wrong)} of {got.size} entries differ, the first at {wrong[:1]}")
