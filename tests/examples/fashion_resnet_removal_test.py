"""The removal example trains, removes and measures, on noise instead of its data."""

import numpy as np
import pytest

from examples import fashion_resnet_removal
from examples.models import resnet


@pytest.mark.slow
def test_half_of_the_operations_are_left(monkeypatch):
    monkeypatch.setattr(resnet, "MODEL", resnet.ResNet(blocks=((8, 2),)))
    rng = np.random.default_rng(0)
    part = lambda n: (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8))
    groups, plan, rows = fashion_resnet_removal.run((part(256), part(64)), 0.5, (1, 1), rounds=9)
    assert list(groups) == ["stem/kernel:3", "Block_0/Conv_0/kernel:3", "Block_0/Conv_1/kernel:3"]
    whole, smaller = rows["whole, trained on"], rows["smaller, trained on"]
    assert smaller["flops"] <= whole["flops"] / 2 and smaller["bytes"] < whole["bytes"]
    assert whole["flops"] == plan.flops[0] // 128
    assert smaller["images_per_second"][0] > 0
