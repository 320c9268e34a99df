"""Where a path leads."""

import os
from pathlib import Path

import pytest

from jaxopt_compress.storage.folder import resolve


@pytest.mark.parametrize("path", ["gs://bucket/run/small", "s3://bucket/small"])
def test_remote_paths_stay_remote(path):
    assert os.fspath(resolve(path)) == path
    assert os.fspath(resolve(path) / "data-1") == f"{path}/data-1"


def test_local_paths_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve("a/../small")) == tmp_path / "small"
    assert Path(resolve("~/small")) == Path.home() / "small"
