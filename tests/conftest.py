"""Tests run on eight fake CPU devices, and share what they compile by way of a folder.

These settings must precede the import of JAX; processes that run tests inherit them.
"""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the cases of a test `in_turn(n)` every n-th runs by default; of several parameters, so
    that each value is in some.
    """
    places = {}
    for item in items:
        if turn := item.get_closest_marker("in_turn"):
            at = 0
            for parameter, value in item.callspec.params.items():
                seen = places.setdefault((item.parent, item.originalname, parameter), {})
                at += seen.setdefault(id(value), len(seen))
            if at % (turn.args or (2,))[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Keeps memory small, and JAX from dropping the oldest of its few thousand compiled calls."""
    yield
    jax.clear_caches()
