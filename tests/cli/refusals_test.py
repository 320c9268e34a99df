"""What the command refuses, and that one line says why."""

import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import jaxopt_compress as jc
from tests.cli.command import params, run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('where = "**/kernl"\nquantize = {format="int8"}', "matches no leaf; the nearest paths"),
        ('where = "step"\nquantize = {format="int8"}', "only floating leaves"),
        (
            'where = "**/kernel"\nquantize = {format="int4", group_size=5}',
            "group_size=5 does not divide",
        ),
        ("low_rank = {rank=99}", "rank=99 is above the limit"),
        ('qantize = {format="int8"}', "did you mean 'quantize'"),
        (
            'low_rank = {rank=2}\n[[rule]]\nwhere="embed"\nlow_rank={rank=2}',
            "put the narrower rule first",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_anything_is_read(
    text, message, recipe, tmp_path, capsys
):
    jc.save(tmp_path / "ckpt", params())
    recipe.write_text(f"[[rule]]\n{text}")
    error = run(capsys, "compress", tmp_path / "ckpt", recipe, tmp_path / "out", code=2)
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('quantize = {format="int8", begin=10}', "begins at update 10, and a checkpoint is"),
        ('progressive = {5={format="int8"}}', "begins at update 5"),
        ('progressive = {0={format="int8"}, 9={format="int4"}}', "begins at update 9"),
        (
            'quantize = {format="int8", activations={format="int8", step="calibrated"}}',
            "the command runs no model.*stats=calibrate",
        ),
        ('quantize = {format="int4", symmetric="no"}', "symmetric='no': it is true or false"),
        ('lsq = {format="int4", group_size=7}', "group_size=7 does not divide axis -2 of 'embed'"),
    ],
)
def test_what_the_command_cannot_do_names_the_rule(text, message, recipe, tmp_path, capsys):
    jc.save(tmp_path / "ckpt", params())
    recipe.write_text(f"[[rule]]\nwhere = 'embed'\n{text}")
    error = run(capsys, "compress", tmp_path / "ckpt", recipe, tmp_path / "out", code=2)
    assert re.search(rf"recipe.toml, rule 1 \(where='embed'\).*{message}", error)
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_only_checkpoints_of_the_command_are_replaced(recipe, tmp_path, capsys):
    source = tmp_path / "in" / "m.safetensors"
    source.parent.mkdir()
    save_file({"kernel": np.ones((16, 8), np.float32)}, source)
    recipe.write_text('[[rule]]\nquantize = {format = "int8"}')
    (tmp_path / "data" / "structure").mkdir(parents=True)
    (tmp_path / "data" / "structure" / "1abc.pdb").write_text("keep")
    (tmp_path / "file").write_text("keep")
    jc.save(tmp_path / "ckpt", {"kernel": jnp.ones((16, 8))})

    def refused(out, ckpt=source):
        before = sorted(tmp_path.rglob("*"))
        error = run(capsys, "compress", ckpt, recipe, out, "--overwrite", code=2)
        assert sorted(tmp_path.rglob("*")) == before and error.count("\n") == 1
        return error

    assert "is a file" in refused(tmp_path / "file")
    assert "is no checkpoint of this package" in refused(tmp_path / "data")
    assert "is, holds or lies in what is read" in refused(source)
    assert "is, holds or lies in what is read" in refused(source.parent)
    assert "is, holds or lies in what is read" in refused(tmp_path / "ckpt", tmp_path / "ckpt")
    run(capsys, "compress", source, recipe, tmp_path / "out")
    run(capsys, "compress", source, recipe, tmp_path / "out", "--overwrite")
    # What is not of the checkpoint stays.
    (tmp_path / "out" / "notes.txt").write_text("keep")
    run(capsys, "compress", source, recipe, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "notes.txt").read_text() == "keep"


def test_paths_that_cannot_be_read_are_named(recipe, tmp_path, capsys):
    missing, out = tmp_path / "missing", tmp_path / "out"
    assert "no checkpoint at" in run(capsys, "inspect", missing, code=2)
    assert "no checkpoint that can be read" in run(capsys, "inspect", tmp_path, code=2)
    (tmp_path / "bad.safetensors").write_bytes(b"12345678abc")
    assert "cannot be read" in run(capsys, "inspect", tmp_path / "bad.safetensors", code=2)
    out.mkdir()
    jc.save(tmp_path / "ckpt", params())
    error = run(capsys, "compress", tmp_path / "ckpt", recipe, out, code=2)
    assert "pass --overwrite" in error
    error = run(capsys, "compress", tmp_path / "ckpt", tmp_path / "no.toml", out, code=2)
    assert "no.toml" in error


def test_several_checkpoints_in_a_folder_are_listed(tmp_path, capsys):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (3, 5):
            manager.save(step, args=ocp.args.StandardSave(params()))
    error = run(capsys, "inspect", tmp_path / "run", code=2)
    assert "several checkpoints, 3/default, 5/default: give the path of one" in error
    assert "layers/0/kernel" in run(capsys, "inspect", tmp_path / "run" / "5")


def test_a_missing_safetensors_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    error = run(capsys, "inspect", tmp_path / "m.safetensors", code=2)
    assert "pip install 'jaxopt-compress[examples]'" in error


@pytest.mark.parametrize("package", ["tyro", "rich"])
def test_the_command_without_its_extra_says_how_to_install_it(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    error = run(capsys, "inspect", "x", code=2)
    assert error == f"error: this needs {package}: pip install 'jaxopt-compress[cli]'\n"


def test_wrong_arguments_exit_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "jaxopt_compress", "inspekt", "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
