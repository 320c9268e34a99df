"""LeNet-5 on Fashion-MNIST by data parallelism, gradients averaged in fewer bytes.

Each of 4 imitated devices sees a quarter of a batch of 128. Three seeds of plain float32 averages
say how much runs differ by themselves; the others have the seed of the first. Bytes are what a
device receives per step, counted from the collectives of the compiled program.

    python -m examples.reduced_gradients            # two epochs each
"""

import argparse
import json
import os
import re
import sys

DEVICES, BATCH = 4, 128
# Read when JAX starts. Imitated devices need threads to wait for each other.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
os.environ |= {"JAX_PLATFORMS": "cpu", "NPROC": "32"}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.models import lenet
from examples.models.training import batches

METHODS = {
    "float32": ("float32", (0, 1, 2)),
    "int8": ("int8", (0,)),
    "int4, blocks of 64": (jc.blockwise("int4", block=64), (0,)),
    "PowerSGD, rank 2": (jc.power_sgd(rank=2), (0,)),
    "PowerSGD, rank 4": (jc.power_sgd(rank=4), (0,)),
    "largest 1%": (jc.top_k(0.01), (0,)),
}


def loss(params, images, labels):
    """Knows nothing of devices."""
    logits = lenet.apply_5(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def received(compiled):
    """Bytes that collectives bring to a device, by a ring where they sum."""
    widths = {"f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1}
    total, pattern = 0, r"= (.*?) (all-reduce|all-gather|all-to-all)(?:-start)?\("
    for types, kind in re.findall(pattern, compiled.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types):
            size = widths[dtype] * np.prod([int(d) for d in dims.split(",") if d])
            total += size * (2 if kind == "all-reduce" else 1)
    return int(total * (DEVICES - 1) / DEVICES)


def train(method, seed, data, epochs, rate):
    """Final parameters, losses of all steps, and bytes per step."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    count = len(data[1]) // BATCH
    schedule = optax.cosine_decay_schedule(rate, epochs * count)
    reduced = jc.reduced_gradients(method, "data", devices=DEVICES, min_size=1024)
    tx = optax.chain(reduced, optax.sgd(schedule, momentum=0.9))
    params = lenet.init_5(jax.random.key(seed))
    opt_state = tx.init(params)
    specs = P(), jc.reduced_specs(opt_state, "data")

    def step(params, opt_state, images, labels):
        # Each device's own gradients: derivatives at what is the same everywhere are summed.
        own = jax.lax.pcast(params, "data", to="varying")
        value, grads = jax.value_and_grad(loss)(own, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(value, "data")

    given = (*specs, P("data"), P("data"))
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=given, out_specs=(*specs, P())))
    split, losses, rng = NamedSharding(mesh, P("data")), [], np.random.default_rng(seed)
    now = (params, opt_state)
    for _ in range(epochs):
        order = rng.permutation(len(data[1]))
        for i in range(count):
            rows = order[i * BATCH : (i + 1) * BATCH]
            batch = jax.device_put([x[rows] for x in data], split)
            *now, value = step(*now, *batch)
            losses.append(float(value))
    return now[0], losses, received(step.lower(*now, *batch).compile())


def main():
    """Trains with each method, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=60000, help="to train with")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()
    training, test = fashion_mnist()
    data = training[0][: args.images], training[1][: args.images].astype(np.int32)
    rows = []
    for name, (method, seeds) in METHODS.items():
        for seed in seeds:
            params, losses, sent = train(method, seed, data, args.epochs, args.rate)
            # From all devices to one, which evaluates.
            params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
            found = jc.evaluate(lenet.apply_5, params, batches(*test), ["accuracy"])
            last = float(np.mean(losses[-200:]))
            row = {"method": name, "seed": seed, "loss": last, "bytes": sent}
            rows.append(row | {"accuracy": 100 * float(found["accuracy"])})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if args.json:
        return print(json.dumps(rows))
    table = Table(title="LeNet-5 on Fashion-MNIST, 4 devices", box=box.SIMPLE_HEAD, padding=0)
    for title in ("method", "seed", "loss", "accuracy %", "bytes per step"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        figures = (f"{row['loss']:.4f}", f"{row['accuracy']:.2f}", f"{row['bytes']:,}")
        table.add_row(row["method"], str(row["seed"]), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
