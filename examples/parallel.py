"""One training, pruned and quantization-aware, on many devices in six ways: the same numbers.

LeNet-300-100 (widened to 304 and 104, which 8 devices share evenly) on Fashion-MNIST, batches of
128; 8 devices are imitated on the CPU. Weights are pruned to 75% in the first steps, and rounded to
int8.

    one device      jax.jit, the reference
    data            jax.jit, images split over 8 devices
    fsdp            and so are parameters, masks, scales and moments
    data x tensor   4 x 2 devices: images, and two layers as in Megatron-LM
    shard_map       each device its images, gradients averaged by hand
    pmap            the same by jax.pmap
    two processes   4 x 2 devices of two processes that jax.distributed joins

Each prints its loss beside that of one device, from which it differs by the order of sums alone,
and the bytes that a device holds. What one way has saved half way goes on in another one.

    python -m examples.parallel
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

DEVICES, BATCH = 8, 128
if "--child" in sys.argv:
    # Read when JAX starts, in processes of their own.
    per_process = DEVICES // int(sys.argv[sys.argv.index("--processes") + 1])
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={per_process}"
    os.environ["JAX_PLATFORMS"] = "cpu"

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
from examples.models.training import scaled
from jaxopt_compress.tree import map_named

MESHES = {
    "one device": ((1, 1), ("data", "model")),
    "data": ((8, 1), ("data", "model")),
    "fsdp": ((8, 1), ("data", "model")),
    "data x tensor": ((4, 2), ("data", "model")),
    "shard_map": ((8, 1), ("data", "model")),
    "pmap": ((8, 1), ("data", "model")),
    "two processes": ((4, 2), ("data", "model")),
}
# Half way checkpoints: saved by one way, and what goes on with it.
HANDED_ON = {
    "fsdp": "data x tensor",
    "data x tensor": "two processes",
    "two processes": "one device",
}


def init(key):
    """Layers of 304, 104 and 10."""
    widths, names = (784, 304, 104, 10), ("dense1", "dense2", "head")
    keys = jax.random.split(key, 3)
    return {
        name: {"kernel": scaled(k, a, b), "bias": jnp.zeros(b)}
        for name, k, a, b in zip(names, keys, widths, widths[1:], strict=False)
    }


def loss(params, images, labels):
    """Knows nothing of compression or of devices."""
    logits = lenet.apply_300_100(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training(params):
    """The compression, and the optimizer around it."""
    found = jc.uses(lenet.apply_300_100, params, jax.ShapeDtypeStruct((1, 28, 28), jnp.uint8))
    weights = jc.Glob("**/kernel", min_ndim=2)
    schedule = jc.schedules.polynomial(0.75, begin=2, end=12)
    prune = jc.prune(jc.scores.magnitude(), schedule, where=weights)
    c = jc.chain(prune, jc.quantize("int8", where=weights))
    return c, jc.compressed_training(optax.adam(1e-3), c, uses=found)


def make_step(c, tx, own=lambda x: x, mean=lambda x: x):
    """One step; by hand, `own` makes gradients those of a device, and `mean` averages them."""

    def step(params, opt_state, images, labels):
        view = own(c.view(params, opt_state))
        value, grads = mean(jax.value_and_grad(loss)(view, images, labels))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def spec_of(way, path, leaf):
    """How a parameter is split."""
    if way == "fsdp":
        # The last axis that the devices share evenly, if there is one.
        even = [d for d in range(leaf.ndim) if leaf.shape[d] % DEVICES == 0]
        return P(*("data" if d == even[-1] else None for d in range(leaf.ndim))) if even else P()
    if way in ("data x tensor", "two processes"):
        return {
            "dense1/kernel": P(None, "model"),
            "dense1/bias": P("model"),
            "dense2/kernel": P("model", None),
        }.get(path, P())
    return P()


def start(way, seed=0):
    """Mesh, shardings of the parameters, parameters and the state of the optimizer."""
    shape, names = MESHES[way]
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2, devices=devices)
    params = init(jax.random.key(seed))
    shardings = map_named(lambda path, x: NamedSharding(mesh, spec_of(way, path, x)), params)
    c, tx = training(params)
    state = jax.jit(tx.init)(params)
    # From the host, since each process may place only what all of them hold.
    params, state = jax.tree.map(np.asarray, (params, state))
    places = {"params": shardings, "opt_state": jc.state_shardings(state, params, shardings)}
    placed = jc.shard(params, shardings), jc.shard(state, places["opt_state"])
    return mesh, c, tx, places, *placed


def batches(steps, noise=False, seed=0):
    """Batches of images and labels, in an order that all processes know."""
    rng, count = np.random.default_rng(seed), steps * BATCH
    if noise:
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count)
    else:
        images, labels = fashion_mnist()[0]
    rows = rng.permutation(len(labels))[:count].reshape(steps, BATCH)
    return [(images[r], labels[r].astype(np.int32)) for r in rows]


def compiled(way, c, tx, mesh):
    """``step(params, opt_state, images, labels)``."""
    mean = lambda tree: jax.lax.pmean(tree, "data")
    own = lambda tree: jax.lax.pcast(tree, "data", to="varying")
    if way == "shard_map":
        placed = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
        return jax.jit(jax.shard_map(make_step(c, tx, own, mean), mesh=mesh, **placed))
    if way == "pmap":
        placed = {"in_axes": (None, None, 0, 0), "out_axes": None}
        step = jax.pmap(make_step(c, tx, mean=mean), "data", **placed)
        parts = lambda x: x.reshape(DEVICES, -1, *x.shape[1:])
        return lambda *args: step(*args[:2], *map(parts, args[2:]))
    return jax.jit(make_step(c, tx))


def run(way, data, folder, begin=0, source=None):
    """Trains by one way from step `begin`, with the checkpoint of another way if there is one.

    Saves a checkpoint half way, and what was trained in its stored form. Returns figures.
    """
    mesh, c, tx, places, params, opt_state = start(way)
    split = NamedSharding(mesh, P("data"))
    if source is not None:
        like = jc.shard(jax.eval_shape(lambda *x: x, params, opt_state), tuple(places.values()))
        params, opt_state = jc.load(folder / f"half, {source}", like=like)
    step, losses = compiled(way, c, tx, mesh), []
    for i, batch in enumerate(data[begin:], begin):
        if i == len(data) // 2 and source is None:
            jc.save(folder / f"half, {way}", (params, opt_state))
        # Of each array a process reads the rows of its own devices.
        place = lambda x: jax.make_array_from_callback(x.shape, split, lambda rows: x[rows])
        params, opt_state, value = step(params, opt_state, *map(place, batch))
        losses.append(float(value))
    small = jc.compress(params, c, state=opt_state)
    name = f"{way} after {source}" if source else way
    jc.save(folder / name, {"params": params, "small": small})
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((params, opt_state)))
    return {"way": name, "losses": losses, "bytes_per_device": held}


def child(args):
    """Runs the ways that `args` names in this process, one of `args.processes`."""
    if args.processes > 1:
        jax.distributed.initialize(args.address, args.processes, args.index)
    data, folder = batches(args.steps, noise=args.noise), Path(args.folder)
    for way in args.child:
        way, _, source = way.partition(" after ")
        begin = args.steps // 2 if source else 0
        print(f"{way}{' after ' * bool(source)}{source}", file=sys.stderr, flush=True)
        row = run(way, data, folder, begin, source or None)
        if jax.process_index() == 0:
            (folder / f"{row['way']}.json").write_text(json.dumps(row))


def spawn(ways, folder, args, processes=1):
    """Runs ways in new processes, which share what they compile."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = ["--steps", args.steps, "--folder", folder, "--processes", processes]
    common += ["--address", address, *(["--noise"] if args.noise else [])]
    command = [sys.executable, "-m", "examples.parallel", "--child", *ways, *map(str, common)]
    # XLA gives each imitated device one thread, and two collectives at once would wait for a third.
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "NPROC": "64",
    } | os.environ
    started = [
        subprocess.Popen([*command, "--index", str(i)], env=environment) for i in range(processes)
    ]
    try:
        if any(process.wait(timeout=900) for process in started):
            sys.exit(f"{', '.join(ways)}: a process has failed")
    finally:
        for process in started:
            process.kill()


def compare(name, folder):
    """The figures of one way, beside those of one device."""
    row, reference = (json.loads((folder / f"{n}.json").read_text()) for n in (name, "one device"))
    got, want = (jc.load(folder / n) for n in (name, "one device"))
    pairs = lambda key: zip(*map(jax.tree.leaves, (got[key], want[key])), strict=True)
    differ = lambda a, b: np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    losses = differ(row["losses"], reference["losses"][-len(row["losses"]) :])
    stored = [jc.materialize(tree["small"]) for tree in (got, want)]
    unlike = [np.asarray(a != b) for a, b in zip(*map(jax.tree.leaves, stored), strict=True)]
    return {
        "way": name,
        "loss": row["losses"][-1],
        "loss_differs": float(losses.max()),
        "first_loss_differs": float(losses[0]),
        "params_differ": float(max(differ(a, b).max() for a, b in pairs("params"))),
        "stored_differ": sum(x.sum() for x in unlike) / sum(x.size for x in unlike),
        "bytes_per_device": row["bytes_per_device"],
    }


def ways(args, folder):
    """Runs all ways; one row of figures for each."""
    alone = [way for way in MESHES if way != "two processes"]
    spawn([*alone, "data x tensor after fsdp"], folder, args)
    spawn(["two processes", "two processes after data x tensor"], folder, args, processes=2)
    spawn(["one device after two processes"], folder, args)
    handed_on = [f"{to} after {way}" for way, to in HANDED_ON.items()]
    return [compare(name, folder) for name in (*MESHES, *handed_on)]


def show(rows, steps):
    """The table for people."""
    table = Table(title=f"{steps} steps beside those of one device", box=box.SIMPLE_HEAD, padding=0)
    titles = ("way", "last loss", "losses differ by", "parameters by", "stored weights, %", "bytes")
    for title in titles:
        table.add_column(title, justify="left" if title == "way" else "right")
    for row in rows:
        figures = [f"{row['loss']:.6f}", f"{row['loss_differs']:.1e}"]
        figures += [f"{row['params_differ']:.1e}", f"{100 * row['stored_differ']:.2f}"]
        table.add_row(row["way"], *figures, f"{row['bytes_per_device']:,}")
    Console().print(table)


def main():
    """Trains in all ways, or with gradients in fewer bytes, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="of each way")
    parser.add_argument("--noise", action="store_true", help="random images in the place of data")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    for name in ("--folder", "--address"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--processes", "--index"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = ways(args, Path(folder))
    print(json.dumps(rows)) if args.json else show(rows, args.steps)


if __name__ == "__main__":
    main()
