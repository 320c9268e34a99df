"""Figures that several runs collect, and how the examples of pretrained models name them."""

import numpy as np
import pytest

from examples import efficientnet, minilm
from examples.results import Results

# Importing the examples takes longer than the tests.
pytestmark = pytest.mark.ci


def test_rows_are_measured_once(tmp_path):
    path = str(tmp_path / "rows.json")
    first = Results(path, {"tokens": 8})
    assert first.row("a", lambda: {"x": 0.1}) == {"x": 0.1}
    again = Results(path, {"tokens": 8})
    assert again.row("a", lambda: pytest.fail("measured again")) == {"x": 0.1}
    assert again.row("b", lambda: {"x": 2}) == {"x": 2} and list(again.rows) == ["a", "b"]
    with pytest.raises(ValueError, match="'tokens': 8"):
        Results(path, {"tokens": 16})


def test_cells_follow_their_globs():
    chosen = minilm.cells(["int4-g64, *", "*, hqq"])
    assert list(chosen)[:2] == ["int4-g64, nearest", "int4-g64, squares"]
    assert "mxfp4, hqq" not in chosen and "nf4-g64, hqq" in chosen
    assert not minilm.cells(["int5, *"])
    assert list(minilm.cells(["*-g64, learned gptq"])) == [
        f"{f}-g64, learned gptq" for f in ("int4", "int3-zero", "int2-zero")
    ]


def test_near_ties_explain_changed_answers():
    want = np.random.default_rng(0).normal(size=(4000, 2))
    got = want + np.random.default_rng(1).normal(size=want.shape)
    found = efficientnet.agreement(got, want)
    # The second answer is the only other one, and the errors are what "by margins" takes them for:
    # 4000 answers leave a standard error of 0.7%.
    assert found["or second"] == 1
    assert found["agree"] == pytest.approx(found["by margins"], abs=0.03)
    assert found["error"] == pytest.approx(np.sqrt(2), rel=0.05)
    assert efficientnet.agreement(want, want)["agree"] == 1
