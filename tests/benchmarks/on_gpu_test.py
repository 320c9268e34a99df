"""The benchmark for GPUs runs on a CPU, with kernels step by step."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_all_of_it_runs_and_nothing_fails():
    script = [sys.executable, "benchmarks/on_gpu.py", "--interpret", "--json"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(row["error"] <= 1 for row in found["checks"])
    assert {row["weights"] for row in found["products"]} >= {"bfloat16", "int4 g128", "2:4"}
    assert all(row["ratio"][0] > 0 for row in found["step"])


def test_without_a_gpu_it_says_what_to_do():
    script = [sys.executable, "benchmarks/on_gpu.py"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--interpret" in done.stderr
