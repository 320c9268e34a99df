"""Runs of the command that are stopped, and go on."""

import jax
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress import cli
from jaxopt_compress.__main__ import main
from tests.cli.command import RECIPE, params, run


def test_ctrl_c_leaves_one_line(recipe, tmp_path, capsys, monkeypatch):
    jc.save(tmp_path / "ckpt", params())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxopt_compress.cli.leaf_report", interrupt)
    args = ("compress", tmp_path / "ckpt", recipe, tmp_path / "out")
    assert main([str(a) for a in args]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_is_resumed(recipe, tmp_path, capsys, monkeypatch):
    jc.save(tmp_path / "ckpt", params())
    command = ("compress", tmp_path / "ckpt", recipe, tmp_path / "out", "--resume")
    compressed = []
    original = cli.compress_tree

    def stopped(tree, *args, **options):
        compressed.append(tree)
        if len(compressed) == 2:
            raise KeyboardInterrupt
        return original(tree, *args, **options)

    monkeypatch.setattr(cli, "compress_tree", stopped)
    run(capsys, *command, code=130)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    run(capsys, *command)
    # Three leaves have a rule; the one that was finished is not compressed again.
    assert len(compressed) == 4 and not (tmp_path / "out.partial").exists()
    expected = run(capsys, "compress", tmp_path / "ckpt", recipe, tmp_path / "plain")
    assert expected.count("int4 g8") == 2
    found, plain = (jc.load(tmp_path / name) for name in ("out", "plain"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_leaves_of_another_recipe_are_not_resumed(recipe, tmp_path, capsys, monkeypatch):
    jc.save(tmp_path / "ckpt", params())
    command = ("compress", tmp_path / "ckpt", recipe, tmp_path / "out", "--resume")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli, "compress_tree", stopped)
        run(capsys, *command, code=130)
    recipe.write_text(RECIPE.replace("int4", "int8"))
    assert "another checkpoint, recipe or layout" in run(capsys, *command, code=2)
