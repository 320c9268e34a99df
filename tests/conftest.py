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
def pytest_collection_modifyitems(config, items):
    """Of the cases of a test `fast(id, ...)` those that are listed run by default.

    The examples of pages are the second line: most of them are compiled models.
    """
    seen = {}
    for item in items:
        if item.path.suffix == ".md" and item.path.parent.name == "docs":
            item.add_marker(pytest.mark.ci)
        if fast := item.get_closest_marker("fast"):
            key = (str(item.path), item.originalname)
            missing = seen.setdefault(key, set(fast.args))
            missing.discard(item.callspec.id)
            if item.callspec.id not in fast.args:
                item.add_marker(pytest.mark.slow)
    # Parts of a file may be asked for, with few of the cases.
    wrong = {key: ids for key, ids in seen.items() if ids}
    if wrong and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"fast() names cases that there are not: {wrong}")


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Keeps memory small, and JAX from dropping the oldest of its few thousand compiled calls."""
    yield
    jax.clear_caches()
