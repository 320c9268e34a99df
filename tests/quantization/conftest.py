"""Tests over every format take minutes, and run with `make test-slow`."""

import pytest

FAST = ("packages_test.py", "qwix_test.py", "torchao_test.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "quantization" and item.path.name not in FAST:
            item.add_marker(pytest.mark.slow)
