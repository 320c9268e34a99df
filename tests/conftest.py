"""Tests run on eight fake CPU devices, and share what they compile by way of a folder.

Two thirds of their time is compilation, so jaxlib 0.10 compiles without LLVM's optimizations, which
halves it. `make test-slow` and `make test-newest` compile as users do, as does every run with
`XLA_FLAGS=--xla_backend_optimization_level=3`.

These settings must precede the import of JAX; processes that run tests inherit them.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
if "--xla_backend_optimization_level" not in os.environ["XLA_FLAGS"] and version(
    "jaxlib"
).startswith("0.10."):  # an unknown flag ends the process
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of the cases of a test `fast(id, ...)` those that are listed run by default.

    The examples of pages are the second line: most of them are compiled models.
    """
    seen, both = {}, set()
    for item in items:
        if item.path.suffix == ".md" and item.path.parent.name == "docs":
            item.add_marker(pytest.mark.ci)
        if fast := item.get_closest_marker("fast"):
            key = (str(item.path), item.originalname)
            missing = seen.setdefault(key, set(fast.args))
            missing.discard(item.callspec.id)
            if any(mark.name == "slow" for mark in item.function.pytestmark):
                both.add(key)
            if item.callspec.id not in fast.args:
                item.add_marker(pytest.mark.slow)
    # Parts of a file may be asked for, with few of the cases.
    wrong = {key: ids for key, ids in seen.items() if ids}
    if wrong and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"fast() names cases that there are not: {wrong}")
    if both:
        raise pytest.UsageError(f"slow, so that no case that fast() lists runs: {both}")


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Keeps memory small, and JAX from dropping the oldest of its few thousand compiled calls."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def drawn_anew(request):
    """A module's RNG starts anew for each test: no test depends on those that ran before it."""
    if isinstance(rng := getattr(request.module, "RNG", None), np.random.Generator):
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state
