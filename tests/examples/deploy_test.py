"""What the example deploys runs in other processes, on noise instead of its data."""

import jax
import numpy as np
import pytest

from examples import deploy
from examples.models import lenet

pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_other_processes_find_the_same(tmp_path):
    rng = np.random.default_rng(0)
    test = rng.integers(0, 256, (1000, 28, 28), np.uint8), rng.integers(0, 10, 1000)
    rows = deploy.deployed(lenet.init_5(jax.random.key(0)), test, tmp_path)
    assert len(rows) == 4
    assert all(row["differs"] < 1e-3 for row in rows)
    # 431,080 weights of 8 bits, and of 4.
    assert all(row["bytes"] < (480e3 if row["weights"] == "int8" else 330e3) for row in rows)
