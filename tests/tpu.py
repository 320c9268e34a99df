"""Processes that compile for TPUs."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def needs_libtpu(test):
    """One process may use libtpu at a time, and keeps it until it ends."""
    missing = not importlib.util.find_spec("libtpu")
    skipped = pytest.mark.skipif(missing, reason="libtpu is not installed")
    return pytest.mark.xdist_group("libtpu")(skipped(test))


def python(*arguments):
    """What Python prints, given these arguments; without the flags that compile tests faster."""
    path = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A process that has ended may still lock others out.
    wanted = {"PYTHONPATH": os.pathsep.join(path), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | wanted
    script = [sys.executable, *arguments]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
