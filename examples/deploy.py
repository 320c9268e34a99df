"""LeNet-5 trained, compressed, and run in processes that do not have this package.

    artifact   a folder of StableHLO and int8 or int4 weights, run by jax and numpy alone
    onnx       a file, run by onnxruntime (pip install 'jaxopt-compress[deploy]')

Both take any number of images. Accuracy is on the 10000 test images of Fashion-MNIST, and is
computed in the other process; outputs are compared with those here.

    python -m examples.deploy              # trains for two epochs
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.models import lenet
from examples.models.training import cross_entropy, train

# What runs elsewhere; it imports nothing of this project.
BEGIN = """
import sys, numpy as np
for name in ("jaxopt_compress", "flax", "optax", "orbax"):
    sys.modules[name] = None                     # An import of it would fail.
model, folder = sys.argv[1:]
"""
RUNNERS = {
    "artifact": """
import runpy
fn = runpy.run_path(model + "/load.py")["load"](model)
""",
    "onnx": """
import onnxruntime
options = onnxruntime.SessionOptions()
# Float32 activations; by default this runtime rounds them to int8 where weights have few bits.
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
session = onnxruntime.InferenceSession(model, options)
fn = lambda *xs: session.run(None, {f"input_{i}": x for i, x in enumerate(xs)})[0]
""",
}
END = """
inputs = list(np.load(folder + "/inputs.npz").values())
parts = [fn(*(x[i : i + 1000] for x in inputs)) for i in range(0, len(inputs[0]), 1000)]
np.save(folder + "/outputs.npy", np.concatenate(parts))
"""


def elsewhere(kind, model, folder, *inputs):
    """Outputs for all rows of the inputs, computed by a fresh process outside of the project."""
    np.savez(folder / "inputs.npz", *inputs)
    script = BEGIN + RUNNERS[kind] + END
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script, str(model), str(folder)]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    return np.load(folder / "outputs.npy")


def size_of(path):
    """Bytes of a file or of the files of a folder."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in files)


def deployed(params, test, folder):
    """One row of figures for each format and kind."""
    images, labels = test
    shape = jax.export.symbolic_shape("batch, 28, 28")
    rows, any_batch = [], jax.ShapeDtypeStruct(shape, jnp.uint8)
    uses = jc.uses(lenet.apply_5, params, images[:1])
    int8 = jc.quantize("int8")
    recipes = {
        "int8": {"**/kernel": int8},
        "int8, int4": {"conv*/kernel": int8, "**/kernel": jc.quantize("int4", group_size=20)},
    }
    for name, recipe in recipes.items():
        small = jc.compress(params, recipe, uses=uses)
        lifted = jax.jit(jc.lift(lenet.apply_5))
        want = np.concatenate([lifted(small, x) for x in np.split(images, len(images) // 1000)])
        for kind in RUNNERS:
            model = folder / (f"{name}" if kind == "artifact" else f"{name}.onnx")
            write = jc.export if kind == "artifact" else jc.export_onnx
            write(model, lenet.apply_5, small, any_batch)
            logits = elsewhere(kind, model, folder, images)
            row = {"weights": name, "kind": kind, "bytes": size_of(model)}
            row["accuracy"] = 100 * float(np.mean(logits.argmax(-1) == labels))
            row["here"] = 100 * float(np.mean(want.argmax(-1) == labels))
            rows.append(row | {"differs": float(np.abs(logits - want).max() / np.abs(want).max())})
    return rows


def main():
    """Trains, exports and compares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=60000, help="to train with")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()
    training, test = fashion_mnist()
    training = [x[: args.images] for x in training]
    objective = cross_entropy(lenet.apply_5)
    params, _ = train(objective, lenet.init_5(jax.random.key(0)), *training, args.epochs)
    with tempfile.TemporaryDirectory() as folder:
        rows = deployed(params, test, Path(folder))
    if args.json:
        return print(json.dumps(rows))
    title = f"LeNet-5, {sum(x.nbytes for x in jax.tree.leaves(params)):,} bytes in float32"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for column in ("weights", "kind", "bytes", "accuracy %", "here %", "outputs differ by"):
        table.add_column(column, justify="left" if column in ("weights", "kind") else "right")
    for row in rows:
        figures = [f"{row['bytes']:,}", f"{row['accuracy']:.2f}", f"{row['here']:.2f}"]
        table.add_row(row["weights"], row["kind"], *figures, f"{row['differs']:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
