"""The same training on any number of devices, on noise instead of its data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples import parallel

ROOT = Path(__file__).parents[2]


@pytest.mark.ci
def test_numbers_and_checkpoints_do_not_depend_on_the_mesh(tmp_path):
    data = parallel.batches(4, noise=True)
    runs = [
        parallel.run("one device", data, tmp_path),
        parallel.run("fsdp", data, tmp_path),
        parallel.run("data x tensor", data, tmp_path, begin=2, source="fsdp"),
    ]
    for row in runs:
        (tmp_path / f"{row['way']}.json").write_text(json.dumps(row))
    for name in ("fsdp", "data x tensor after fsdp"):
        row = parallel.compare(name, tmp_path)
        # Sums in another order, and few codes that fall on the other side of a border.
        assert row["loss_differs"] < 1e-4 and row["params_differ"] < 4e-3
    assert runs[1]["bytes_per_device"] < 0.2 * runs[0]["bytes_per_device"]


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
