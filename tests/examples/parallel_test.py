"""The same training on any number of devices, on noise instead of its data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import parallel

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.ci
def test_a_checkpoint_of_eight_devices_goes_on_with_one(tmp_path):
    data = parallel.batches(4, noise=True)
    split = parallel.run("fsdp", data, tmp_path)
    alone = parallel.run("one device", data, tmp_path, begin=2, source="fsdp")
    # Sums in another order, and few codes that fall on the other side of a border.
    np.testing.assert_allclose(alone["losses"], split["losses"][2:], rtol=0, atol=1e-4)
    assert split["bytes_per_device"] < 0.2 * alone["bytes_per_device"]


@pytest.mark.slow
def test_all_ways_agree():
    command = [sys.executable, "-m", "examples.parallel", "--noise", "--steps", "6", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == len(parallel.MESHES) + len(parallel.HANDED_ON)
    assert all(row["loss_differs"] < 1e-4 and row["params_differ"] < 6e-3 for row in rows)


@pytest.mark.slow
def test_gradients_in_fewer_bytes_train_as_well():
    """int8 within the spread of three seeds of float32."""
    command = [sys.executable, "-m", "examples.reduced_gradients", "--epochs", "1"]
    command += ["--images", "6400", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    losses = {}
    for row in rows:
        losses.setdefault(row["method"], []).append(row["loss"])
    plain = losses["float32"]
    for name in ("int8", "int4, blocks of 64", "PowerSGD, rank 4"):
        assert losses[name][0] <= max(plain), name
    sent = {row["method"]: row["bytes"] for row in rows}
    assert sent["int8"] < 0.26 * sent["float32"]
