"""Deep compression runs, on few images, and its file is loaded by another process."""

import json
import sys

import pytest

from examples import deep_compression

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::jaxopt_compress.LargerWarning"),
]


@pytest.mark.parametrize(("method", "ratio"), [("deep", 80), ("rate", 8)])
def test_a_quick_run(method, ratio, monkeypatch, capsys, tmp_path):
    """The ratio of 97% pruned and 16 values: far more than 32 / 4; of rate: than int8's."""
    out = tmp_path / "rows.json"
    words = ["deep_compression", "--quick", "--json", "--method", method, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    deep_compression.main()
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads(out.read_text())["rows"]
    (row,) = rows.values()
    assert row["ratio"] > ratio and row["bytes"] < row["plain"]
    monkeypatch.setattr(deep_compression, "run", None)  # Nothing is left to do.
    deep_compression.main()
