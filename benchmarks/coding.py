"""Bytes of coded codes beside their entropy, zstd and DeepCABAC, and the speed of decoding.

python benchmarks/coding.py [--models lenet minilm] [--epochs 3] [--seed 0] [--nets FOLDER] [--json]

The weights are real: LeNet-300-100 and LeNet-5 trained on MNIST, and MiniLM. What is counted is the
codes and the positions of kept weights; scales and biases are left out. `nncodec` stands for the
codes of DeepCABAC in the package of that name (ISO/IEC 15938-17), given the same codes with output
channels or input channels as its rows, whichever takes fewer bytes for a leaf; it is left out where
it is not installed (`pip install --no-deps nncodec==2.1.3`: what it asks for is not needed here).

Masks of pruned weights are also measured alone: the distances of kept entries in unary, by
Golomb-Rice with the best parameter for each leaf, and by each coding. `--nets` takes the dense
LeNets that `examples.deep_compression --folder FOLDER` left there, in the place of training.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress.arrays import SparseArray
from jaxopt_compress.storage.coding import blocks, integers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

CODINGS = ("ans", "huffman", "zstd", "context")
WEIGHTS = "**/kernel"


def lenet(epochs, seed, folder):
    """The parameters of both networks after some epochs, or as they were left in a folder."""
    if folder is not None:
        found = {path.name: jc.load(path) for path in sorted(folder.glob("dense-*"))}
        return {name.removeprefix("dense-").rpartition("-")[0]: x for name, x in found.items()}
    from examples.data import mnist
    from examples.models import lenet as models
    from examples.models.training import cross_entropy, train

    training, _ = mnist()
    return {
        name: train(cross_entropy(apply), init(jax.random.key(seed)), *training, epochs, seed=seed)[
            0
        ]
        for name, (init, apply) in models.MODELS.items()
    }


def minilm(*_):
    """Those of the sentence encoder, without its vocabulary."""
    from examples.fetching import fetch
    from examples.models.minilm import load

    return {"MiniLM": {"layers": load(fetch("minilm"))["layers"]}}


MODELS = {"lenet": lenet, "minilm": minilm}


def variants():
    """Compressions by name."""
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.8), where=WEIGHTS)
    return {
        "int8": jc.quantize("int8", where=WEIGHTS),
        "int4": jc.quantize("int4", where=WEIGHTS),
        "int4 g32": jc.quantize("int4", group_size=32, pad=True, where=WEIGHTS),
        "80% pruned, int8": jc.chain(prune, jc.quantize("int8", where=WEIGHTS)),
    }


def quantized(tree):
    """The codes of a tree's quantized leaves."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jc.QuantizedArray))
    return [leaf for leaf in leaves if isinstance(leaf, jc.QuantizedArray)]


def dense_codes(leaf):
    """Integers of the dense shape, zeros where pruned."""
    return np.asarray(leaf.unpacked()).astype(np.int32)


def entropy_bytes(x):
    """The zero-order entropy of the symbols, in bytes."""
    counts = np.unique(x, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def nncodec_bytes(codes):
    """Bytes of the arithmetic coder of nncodec; None without it."""
    try:
        from nncodec.extensions import deepCABAC
    except ImportError:
        return None

    def size(matrix):
        coder = deepCABAC.Encoder()
        coder.initCtxModels(11, 1)  # As the package does by default.
        skipped = np.zeros(len(matrix), np.int32)
        off = deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8)
        coder.encodeLayer(np.ascontiguousarray(matrix), 0, 0, 0, 0, 0, skipped, *off, 0, 0)
        return coder.finish().size

    matrix = codes.reshape(-1, codes.shape[-1])
    return min(size(matrix), size(matrix.T))


def decoding_speed(leaves, coding):
    """Megabytes of float32 weights per second, of the largest leaf."""
    codes = max((dense_codes(leaf) for leaf in leaves), key=np.size)
    symbols = (codes.reshape(-1) + 128).astype(np.uint8)
    columns = codes.shape[-1]
    raw = memoryview(blocks.encode(symbols, 8, coding, columns))
    begin = time.perf_counter()
    found, _ = blocks.decode(raw, len(symbols), 8, columns)
    spent = time.perf_counter() - begin
    assert np.array_equal(found, symbols)
    return 4e-6 * len(symbols) / spent


def masks(params, sparsity):
    """Bytes that say which entries of all kernels are kept, pruned by magnitude over all layers."""
    schedule = jc.schedules.constant(sparsity)
    prune = jc.prune(jc.scores.magnitude(), schedule, where=WEIGHTS, scope="global")
    view = prune.apply(params, prune.init(params, uses=None))
    kernels = [np.asarray(x) for x in jax.tree.leaves(view) if x.ndim > 1]
    found = dict.fromkeys(("entropy", "unary", "rice", "ans", "context"), 0)
    for mask in (x != 0 for x in kernels):
        bits = mask.reshape(-1)
        gaps = (np.diff(np.flatnonzero(bits), prepend=-1) - 1).astype(np.uint64)
        found["entropy"] += round(entropy_bytes(bits))
        found["unary"] += -(-int(gaps.sum() + len(gaps)) // 8)
        found["rice"] += len(integers.encode_rice(gaps))
        found["ans"] += len(integers.encode(gaps, "ans"))
        symbols = bits.astype(np.uint8)
        found["context"] += len(blocks.encode(symbols, 1, "context", mask.shape[-1]))
    return found


def measure(models, epochs, seed, folder=None):
    """Figures by model and variant."""
    figures = {}
    for model in models:
        for name, params in MODELS[model](epochs, seed, folder).items():
            for sparsity in (0.8, 0.95) if model == "lenet" else ():
                print(name, f"masks at {sparsity:.0%}", masks(params, sparsity), file=sys.stderr)
            for variant, compression in variants().items():
                small = jc.compress(params, compression, layout="in,out")
                leaves = quantized(small)
                figures[f"{name}, {variant}"] = row(leaves)
                print(name, variant, figures[f"{name}, {variant}"], file=sys.stderr)
    return figures


def row(leaves):
    """The figures of one variant."""
    held = [leaf.codes for leaf in leaves]
    parts = [[c.values, c.mask()] if isinstance(c, SparseArray) else [c] for c in held]
    entropy = sum(entropy_bytes(np.asarray(x).astype(np.int32)) for own in parts for x in own)
    found = {"plain": jc.nbytes(held), "entropy": round(entropy), "leaves": len(leaves)}
    for coding in CODINGS:
        found[coding] = coded(leaves, coding)
    found["nncodec"] = sum(nncodec_bytes(dense_codes(leaf)) or 0 for leaf in leaves) or None
    for coding in CODINGS:
        found[f"{coding}_mb_per_s"] = round(decoding_speed(leaves, coding), 1)
    return found


def coded(leaves, coding):
    """Bytes of codes and positions, without scales."""
    total = jc.coded_bytes(leaves, coding)
    return total - jc.coded_bytes([leaf.scale for leaf in leaves], coding)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nets", type=pathlib.Path, help="dense LeNets that are there already")
    args = parser.parse_args()
    figures = measure(args.models, args.epochs, args.seed, args.nets)
    if args.json:
        print(json.dumps(figures))
        return
    for name, found in figures.items():
        print(f"\n{name}: {found['leaves']} leaves")
        for key in ("plain", "entropy", *CODINGS, "nncodec"):
            if found[key] is not None:
                speed = found.get(f"{key}_mb_per_s")
                print(
                    f"  {key:8} {found[key]:>12,} bytes {found[key] / found['entropy']:7.4f} of "
                    f"the entropy{f', decoded at {speed} MB/s of float32' if speed else ''}"
                )


if __name__ == "__main__":
    main()
