"""A model of 8 billion weights compiles for 256 chips, without one of them."""

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
def test_decoding_of_8b_holds_no_dense_weight():
    script = [sys.executable, "benchmarks/pods.py", "--json", "--only", "decode/8B/v5e"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["fits"] and row["dense_weights"] == []
    # An eighth of weights of 4.25 bits and of the embedding; and the cache.
    assert row["argument_bytes"] < 0.8e9
