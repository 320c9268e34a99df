"""One model in every kind of file: bytes, and seconds to write it and to read it.

The weights of MiniLM in float32, and in int8 and int4 in groups of 32, as checkpoints of this
package (plain, coded, and written while the program goes on), as safetensors in the form of the
package compressed-tensors, as GGUF and as bytes of Flax. Whatever comes back is compared with what
was written, bit for bit.

    python -m examples.file_formats
    python -m examples.file_formats --only int4 --folder out
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import serialization

import jaxopt_compress as jc
from examples.deploy import size_of
from examples.fetching import fetch
from examples.models import minilm
from examples.results import show
from jaxopt_compress.tree import named_leaves

BITS = ("float32", "int8", "int4")


def models(params):
    """Name -> tree. Names and layouts are those of PyTorch, which other programs expect."""
    turned = {}
    for path, w in named_leaves(params):
        parent, name = path.rsplit("/", 1)
        name = {"kernel": "weight", "embedding": "weight"}.get(name, name)
        turned[f"{parent}/{name}"] = w.T if path.endswith("kernel") else w
    rounded = lambda bits: jc.quantize(
        bits, group_size=32, scale_dtype="float16", where="**/weight"
    )
    small = {b: jc.compress(turned, rounded(b), layout="out,in") for b in BITS[1:]}
    return {"float32": turned} | small


def write_async(path, tree):
    """Begins to save, and returns the function that waits for the end."""
    return jc.save_async(path, tree).result


def flax_bytes(path, tree):
    path.write_bytes(serialization.to_bytes(tree))


def nested(tree):
    """Dicts of dicts, which the dots in names of safetensors stand for."""
    found = {}
    for path, leaf in tree.items():
        *parents, name = path.split("/")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = leaf
    return found


# Kind of file -> how to write it, and how to read it; the tree is for forms that need a template.
KINDS = {
    "checkpoint": (jc.save, lambda path, tree: jc.load(path)),
    "checkpoint, in a thread": (write_async, lambda path, tree: jc.load(path)),
    "checkpoint, zstd": (
        lambda path, tree: jc.save(path, tree, coding="zstd"),
        lambda path, tree: jc.load(path),
    ),
    "checkpoint, ans": (
        lambda path, tree: jc.save(path, tree, coding="ans"),
        lambda path, tree: jc.load(path),
    ),
    "safetensors": (
        lambda path, tree: jc.save_safetensors(path, nested(tree)),
        lambda path, tree: dict(named_leaves(jc.load_safetensors(path))),
    ),
    "gguf": (
        lambda path, tree: jc.save_gguf(path, tree, "bert"),
        lambda path, tree: {k.replace(".", "/"): w for k, w in jc.load_gguf(path).items()},
    ),
    "flax": (
        flax_bytes,
        lambda path, tree: serialization.from_bytes(tree, path.read_bytes()),
    ),
}


def same(got, want):
    """Whether all arrays have the same values, their stored forms included."""
    got, want = (jax.tree.leaves(dict(sorted(tree.items()))) for tree in (got, want))
    equal = lambda a, b: a.dtype == b.dtype and bool(np.array_equal(a, b))
    return len(got) == len(want) and all(map(equal, got, want))


def measure(kind, tree, path):
    """Bytes and seconds of a file, and whether the tree comes back."""
    write, read = KINDS[kind]
    start = time.perf_counter()
    wait = write(path, tree)
    row = {"returned": time.perf_counter() - start}
    if wait:
        wait()
    row["write"] = time.perf_counter() - start
    start = time.perf_counter()
    back = jax.block_until_ready(read(path, tree))
    row |= {"read": time.perf_counter() - start, "bytes": size_of(path)}
    return row | {"same": same(back, tree)}


def main(argv=None):
    """Writes and reads all of them, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(BITS), choices=BITS)
    parser.add_argument("--folder", type=Path, help="keep the files here, in a new folder")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    jc.register_flax_serialization()
    found, memory = {}, {}
    with tempfile.TemporaryDirectory() as aside:
        folder = args.folder or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        for bits, tree in models(minilm.load(fetch("minilm"))).items():
            memory[bits] = jc.resident_bytes(tree)
            for i, kind in enumerate(KINDS if bits in args.only else ()):
                found[f"{bits}, {kind}"] = measure(kind, tree, folder / f"{bits}-{i}")
    if args.json:
        print(json.dumps(found))
        return found
    seconds = lambda row: [f"{row[key]:.2f}" for key in ("returned", "write", "read")]
    lines = {
        name: [f"{row['bytes']:,}", *seconds(row), "yes" if row["same"] else "no"]
        for name, row in found.items()
    }
    columns = ["bytes", "returns", "written", "read", "the same"]
    show("MiniLM in files; times in seconds", columns, lines)
    print("bytes in memory:", ", ".join(f"{bits} {size:,}" for bits, size in memory.items()))
    return found


if __name__ == "__main__":
    main()
