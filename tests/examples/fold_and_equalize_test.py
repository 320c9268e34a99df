"""The example of folding and equalization, trained for fewer steps."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / "examples" / "fold_and_equalize.py"


@pytest.mark.slow
def test_equalization_recovers_bad_scales():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("fold_and_equalize", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.STEPS = 60
    results = example.main()
    trained = results["trained"]["float32"]
    assert trained > 0.7
    for name in ("folded", "badly scaled"):
        assert results[name]["float32"] == pytest.approx(trained, abs=0.01)
        assert results[f"{name}, equalized"]["float32"] == results[name]["float32"]
        assert results[f"{name}, equalized"]["int8"] > trained - 0.05
        assert results[f"{name}, equalized"]["int4"] > trained - 0.2
    assert results["badly scaled"]["int4"] < trained - 0.4
