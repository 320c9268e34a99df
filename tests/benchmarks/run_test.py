"""The runner of the benchmarks: what is compared, and what counts as drift."""

import doctest
import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("bench_run", ROOT / "benchmarks/run.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def drifted(old, new, **options):
    return [c.name for c in bench.compare(old, new, **options) if c.drifted]


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("all_ratio", 1.0, 1.1, False),
        ("all_ratio", 1.0, 1.11, True),
        ("all_ratio", 1.0, 0.89, True),
        ("all_ratio", 1.0, float("nan"), True),
        ("mlp int8 bytes_ratio", 1.0, 1.001, True),
        ("rows/stack/v5e/int8/weight_ratio", 0.5, 0.501, True),
        ("rows/stack/v5e/int8/predicted_us", 10.0, 10.9, False),
        ("all_ms", 1.0, 9.0, False),
        ("plain_equations", 100, 101, True),
        ("none_is_equal", True, False, True),
        ("temporary_bytes", 0, 1, True),
        ("temporary_bytes", 0, 0, False),
        ("rounds", 20, 3, False),
    ],
)
def test_drift_is_beyond_the_tolerance_of_a_figure(name, old, new, expected):
    assert drifted({name: old}, {name: new}) == [name] * expected


def test_figures_that_are_gone_are_named_and_new_ones_are_no_drift():
    assert drifted({"a": 1}, {"b": 1}) == ["a"]
    assert drifted({"a": 1}, {"b": 1}, quick=True) == []


def test_quick_runs_compare_counts_alone():
    old, new = {"ratio": 1.0, "count": 1}, {"ratio": 9.0, "count": 2}
    assert drifted(old, new, quick=True) == ["count"]


def test_flat_names():
    found, attempted = doctest.testmod(bench)
    assert attempted and not found
    rows = [{"program": "p", "target": t, "bytes": i, "copies": []} for i, t in enumerate("ab")]
    flat = bench.flatten({"rows": rows})
    assert flat["rows/p/b/bytes"] == 1
    # Else the first entry of a list would be a new figure, and no drift.
    rows[1]["copies"] = ["bf16[8,8] HBM"]
    assert drifted(flat, bench.flatten({"rows": rows})) == ["rows/p/b/copies"]


def test_every_script_has_an_entry():
    for name in bench.QUICK:
        assert (ROOT / f"benchmarks/{name}.py").exists()


SCRIPT = """
import json, os, sys
print(json.dumps({"all_ratio": [float(os.environ["RATIO"]), 0, 9], "argv": sys.argv[1:]}))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "trace_time.py").write_text(SCRIPT)
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("RATIO", "1.0")
    assert bench.main(["--only", "trace_time", "--update", "--seed", "7"]) == 0
    return tmp_path


def test_results_record_what_they_were_made_with(folder):
    found = json.loads((folder / "results/trace_time.json").read_text())
    assert found["seed"] == 7 and "--seed 7" in found["command"]
    assert found["figures"]["argv"] == ["--json", "--seed", "7"]
    assert found["versions"]["jax"] and found["machine"]["cores"] >= 1
    assert found["date"].endswith("Z")


def test_check_fails_on_drift_and_update_accepts_it(folder, monkeypatch, capsys):
    again = ["--only", "trace_time", "--seed", "7"]
    monkeypatch.setenv("RATIO", "1.5")
    assert bench.main(again) == 0
    assert bench.main([*again, "--check"]) == 1
    out = capsys.readouterr().out
    assert "drifted: trace_time: all_ratio" in out
    assert bench.main([*again, "--update"]) == 0
    assert bench.main([*again, "--check"]) == 0


def test_failures_end_with_1_and_are_not_accepted(folder, monkeypatch, capsys):
    before = (folder / "results/trace_time.json").read_text()
    monkeypatch.setenv("CODE", "3")
    assert bench.main(["--only", "trace_time", "--update"]) == 1
    assert "failed: trace_time" in capsys.readouterr().out
    (folder / "trace_time.py").write_text("raise SystemExit('no figures')")
    assert bench.main(["--only", "trace_time", "--update"]) == 1
    assert (folder / "results/trace_time.json").read_text() == before


def test_quick_results_are_not_accepted(folder):
    with pytest.raises(SystemExit):
        bench.main(["--only", "trace_time", "--quick", "--update"])
