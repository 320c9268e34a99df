"""Compressing and loading take memory for one leaf beside what goes in and comes out."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
import jaxopt_compress as jc

path, kind = sys.argv[1:]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096

def most_beside(fn):
    # The result, and the bytes at the worst moment beyond those before and those of the result.
    gc.collect()
    before, peaks, done = resident(), [], threading.Event()

    def watch():
        while not done.is_set():
            peaks.append(resident())
            time.sleep(0.0005)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        result = jax.block_until_ready(fn())
    finally:
        done.set()
        watching.join()
    return result, max(peaks) - before - size(result)

def size(tree):
    # What a CPU holds: each code in a byte.
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

dense = lambda n: {str(i): jnp.full((n, n), i + 1.0) for i in range(4)}
keep_half = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
methods = {"int8": jc.quantize("int8"), "int4": jc.quantize("int4"), "sparse": keep_half}
if kind == "dense":
    init, compress = (lambda tree: None), (lambda tree, state: tree)
else:
    init, compress = methods[kind].init, methods[kind].compress
n = 3072
# What is compiled and imported is so by now.
first = dense(8)
jc.save(f"{path}/first", compress(first, init(first)))
jc.load(f"{path}/first")
tree = jax.block_until_ready(dense(n))
state = jax.block_until_ready(init(tree))
small, beside = most_beside(lambda: compress(tree, state))
print(beside / (n * n * 4))
jc.save(f"{path}/ckpt", small)
largest = max(map(size, jax.tree.leaves(small)))
del small, tree, state
print(most_beside(lambda: jc.load(f"{path}/ckpt"))[1] / largest)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.fast("dense")
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "sparse"])
def test_one_leaf_is_the_most_beside_arguments_and_result(kind, tmp_path):
    # Without it, the C library keeps what has been freed.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, kind], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compressing, loading = map(float, done.stdout.split())
    # Some pages more are taken by threads, and by what is unpacked at a time.
    assert loading < 1.15
    assert compressing < 1.25
