"""Saving and loading by several processes, each with some of the devices."""

import socket
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, pathlib, sys, traceback
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

index, folder, address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
# Without waiting for the other.
sys.excepthook = lambda *error: (traceback.print_exception(*error), os._exit(1))
jax.distributed.initialize(address, num_processes=2, process_id=index)
import jaxopt_compress as jc

mesh = jax.make_mesh((4,), ("x",))
rows, columns = NamedSharding(mesh, P("x")), NamedSharding(mesh, P(None, "x"))
rng = np.random.default_rng(0)
shapes = dict.fromkeys(("int4", "rows", "rows_int8", "2:4", "raw", "turned"), (64, 48))
# Shards of odd hold no whole words of 4 bits; those of many are parameters of their own.
shapes |= {"odd": (12, 20), "many": (4, 16, 24)}
host = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
dense = {
    k: jax.make_array_from_callback(x.shape, rows, lambda index, x=x: x[index])
    for k, x in host.items()
}
prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
recipe = {
    "int4": jc.quantize("int4"),
    "odd": jc.quantize("int4"),
    "rows": prune,
    "many": prune,
    "rows_int8": jc.chain(prune, jc.quantize("int8")),
    "2:4": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"),
}
want = jax.tree.map(np.asarray, jc.compress(jax.tree.map(jnp.asarray, host), recipe))
small = jc.compress(dense, recipe)
path = f"{folder}/ckpt"

def check(found):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        for shard in a.addressable_shards:
            assert np.asarray(shard.data).tobytes() == b[shard.index].tobytes()

check(small)
jc.save(path, small)
check(jc.load(path))
place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
like = {k: place(x, columns if k == "turned" else rows) for k, x in dense.items()}
like |= {k: small[k] for k in ("rows", "rows_int8", "many")}
found = jc.load(path, like=like)
check(found)
assert found["turned"].sharding == columns and not found["raw"].is_fully_addressable

# Coded, each process in a file of its own.
jc.save(f"{folder}/coded", small, coding="ans")
assert len(list(pathlib.Path(folder).glob("coded/data-*/chunks-*"))) == 2
check(jc.load(f"{folder}/coded"))
check(jc.load(f"{folder}/coded", like=like))

# In threads, while devices compute and tell each other: nothing of the save waits for a device.
saving = [jc.save_async(f"{folder}/{i}", small, coding="ans" if i else None) for i in range(2)]
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
for _ in range(50):
    total(dense["raw"]).block_until_ready()
for i in range(2):
    saving[i].result()
    check(jc.load(f"{folder}/{i}"))

# What the first process finds is what all of them say.
try:
    jc.save(path, small)
    raise AssertionError("saved over another")
except FileExistsError as error:
    assert "first process" in str(error) or index == 0
jc.save(path, {"raw": dense["raw"]}, overwrite=True)
(data,) = pathlib.Path(path).glob("data-*")

# Each process sees damage to what it reads.
own = np.asarray(dense["raw"].addressable_shards[0].data).tobytes()
(file,) = (f for f in data.rglob("*") if f.is_file() and own in f.read_bytes())
damaged = bytearray(file.read_bytes())
damaged[damaged.index(own) + 5] ^= 1
file.write_bytes(damaged)
try:
    jc.load(path, like={"raw": place(dense["raw"], rows)})
    raise AssertionError("damage is not seen")
except jc.CheckpointError as error:
    assert "'raw': its part of shape [16, 48] from [%d, 0]" % (32 * index) in str(error), error
jax.experimental.multihost_utils.sync_global_devices("done")
print("done")
"""


@pytest.mark.slow
def test_two_processes_save_and_load_what_each_holds_a_part_of(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = []
    for i in range(2):
        command = [sys.executable, "-c", SCRIPT, str(i), tmp_path, address]
        with open(tmp_path / f"{i}.txt", "w") as out:
            both.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    end = time.monotonic() + 240
    # If one fails, the other would wait for it.
    while any(p.poll() is None for p in both) and not any(p.poll() for p in both):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    for i, process in enumerate(both):
        process.kill()
        assert process.wait() == 0, (tmp_path / f"{i}.txt").read_text()
