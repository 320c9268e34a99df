"""The command on several files of safetensors, killed in the middle and run again."""

import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxopt_compress as jc

LEAVES = 12
RECIPE = """
[[rule]]
where = "**/weight"
quantize = {format = "int4", group_size = 32}
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_finished_leaves(tmp_path):
    """Killed without warning after some leaves; the result is that of one run."""
    rng, source = np.random.default_rng(0), tmp_path / "ckpt"
    source.mkdir()
    for part in range(3):
        names = [f"layers.{i}.weight" for i in range(part, LEAVES, 3)]
        tensors = {n: rng.standard_normal((64, 96)).astype(np.float32) for n in names}
        save_file(tensors, source / f"model-{part}.safetensors")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-m", "jaxopt_compress", "compress", source]
    command += [tmp_path / "recipe.toml", out, "--coding", "ans", "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finished = lambda: len([p for p in partial.glob("*") if p.is_dir()])
    end = time.monotonic() + 120
    while finished() < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9, "the run ended before it could be killed"
    assert not out.exists() and 1 <= finished() <= LEAVES
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.count("int4 g32") == LEAVES and not partial.exists()
    whole = [*command[:-1]]
    whole[6] = tmp_path / "whole"
    subprocess.run(whole, capture_output=True, check=True)
    found, want = (dict(flat(jc.load(path))) for path in (out, tmp_path / "whole"))
    assert len(want) == LEAVES
    for name, leaf in want.items():
        assert leaf.group_size == 32
        np.testing.assert_array_equal(found[name].materialize(), leaf.materialize())


def flat(tree):
    return ((name, layer["weight"]) for name, layer in tree["layers"].items())
