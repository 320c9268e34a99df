"""Four layers of int8 weights compile for a TPU without a dense copy of any of them."""

import doctest
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_int8_stack_streams_on_v5e():
    names = [f"stack of 4, batch 8/v5e/{weights}" for weights in ("bfloat16", "int[8]")]
    script = [sys.executable, "benchmarks/compile_targets.py", "--json", "--only", *names]
    # One process may use libtpu at a time, and keeps it until it ends.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dense, int8 = json.loads(done.stdout)["rows"]
    assert int8["weight_copies"] == []
    assert int8["argument_bytes"] <= 0.51 * dense["argument_bytes"]
    assert int8["temporary_bytes"] <= dense["temporary_bytes"]


def test_reading_of_compiled_programs():
    spec = importlib.util.spec_from_file_location("hlo_tools", ROOT / "benchmarks/hlo_tools.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
