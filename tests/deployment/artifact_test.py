"""What is exported runs in a process that has jax and numpy alone."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.deployment.loader import load, read_weights
from tests.quantization.cases import normal

# The example of `jaxopt_compress.export` runs by default.
pytestmark = pytest.mark.ci

RECIPES = {
    "int4": jc.quantize("int4", group_size=16),
    "float8": jc.quantize("float8_e4m3fn"),
    "float4": jc.quantize("float4_e2m1fn"),
    "pruned": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
    "low_rank": jc.chain(jc.low_rank(rank=4), jc.quantize("int8")),
}


def fn(params, x):
    for name in RECIPES:
        x = jnp.tanh(x @ params[name])
    return {"y": x}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifacts") / "one"
    params = {k: jnp.asarray(normal(48, 48, seed=i)) / 7 for i, k in enumerate(RECIPES)}
    small = jc.compress(params, RECIPES, layout="in,out")
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 48"), jnp.float32)
    jc.export(path, fn, small, x)
    return path, small


def test_weights_come_back_as_they_were(artifact):
    path, small = artifact
    for got, want in zip(read_weights(path), map(np.asarray, jax.tree.leaves(small)), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got, want)
    assert (path / "weights.bin").stat().st_size == jc.nbytes(small)
    # No weight is a constant of the program.
    assert (path / "program.bin").stat().st_size < 100_000


def test_another_process_runs_it_without_this_package(artifact, tmp_path):
    path, small = artifact
    x = normal(5, 48, seed=9)
    np.save(tmp_path / "x.npy", x)
    script = """
import runpy, sys
for name in ("jaxopt_compress", "flax", "optax", "orbax"):
    sys.modules[name] = None                 # An import of it fails.
import numpy as np
fn = runpy.run_path(sys.argv[1] + "/load.py")["load"](sys.argv[1])
x = np.load(sys.argv[2] + "/x.npy")
np.savez(sys.argv[2] + "/y.npz", of_5=fn(x)["y"], of_2=fn(x[:2])["y"])
"""
    command = [sys.executable, "-c", script, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    want, found = np.asarray(jax.jit(jc.lift(fn))(small, x)["y"]), np.load(tmp_path / "y.npz")
    # The same sums, in another order, through five layers.
    np.testing.assert_allclose(found["of_5"], want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["of_2"], want[:2], rtol=0, atol=1e-5)


def test_it_is_lowered_for_other_platforms(artifact):
    path, small = artifact
    exported = jax.export.deserialize(bytearray((path / "program.bin").read_bytes()))
    assert exported.platforms == ("cpu", "tpu", "cuda")
    assert json.loads((path / "weights.json").read_text())[-1]["end"] == jc.nbytes(small)
    assert load(path)(normal(1, 48))["y"].shape == (1, 48)


def test_nothing_is_replaced(artifact):
    path, small = artifact
    with pytest.raises(FileExistsError, match="choose another path"):
        jc.export(path, fn, small, jnp.ones((1, 48)))
