import importlib.metadata
import json
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import jaxopt_compress as jc
from jaxopt_compress import cli
from jaxopt_compress.__main__ import main
from jaxopt_compress.arrays import QuantizedArray

RECIPE = """
[[rule]]
where = "**/kernel"
quantize = {format = "int4", group_size = 8}

[[rule]]
where = "embed"
low_rank = {energy = 0.9}
"""


def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "embed": draw(20, 6),
        "layers": [{"kernel": draw(16, 8), "bias": draw(8)}, {"kernel": draw(8, 4), "bias": None}],
        "half": draw(3).astype(jnp.bfloat16),
        "step": jnp.int32(7),
    }


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def run(capsys, *argv, code=0):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([str(a) for a in argv]) == code
    done = capsys.readouterr()
    assert "Traceback" not in done.err
    return done.out if code == 0 else done.err


@pytest.fixture(params=["own", "plain", "manager"])
def ckpt(request, tmp_path):
    path = tmp_path / "ckpt"
    if request.param == "own":
        jc.save(path, params())
    elif request.param == "plain":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, params())
    else:
        with ocp.CheckpointManager(path) as manager:
            manager.save(3, args=ocp.args.StandardSave(params()))
    return path


@pytest.mark.fast("own", "manager")
@pytest.mark.ci
def test_orbax_checkpoints_are_compressed_without_a_template(ckpt, recipe, tmp_path, capsys):
    text = run(capsys, "compress", ckpt, recipe, tmp_path / "out")
    assert "int4 g8" in text and "low rank" in text and "rel. error" in text
    kernels, embed = jc.quantize("int4", group_size=8), jc.low_rank(energy=0.9)
    expected = jc.compress(params(), {"**/kernel": kernels, "embed": embed})
    found = jc.load(tmp_path / "out")
    for path in (0, 1):
        a, b = (tree["layers"][path]["kernel"] for tree in (found, expected))
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scale, b.scale)
    assert found["embed"].rank == expected["embed"].rank
    np.testing.assert_array_equal(found["half"], params()["half"])
    assert found["layers"][1]["bias"] is None and found["step"] == 7
    # The result can be inspected, and compressed further.
    text = run(capsys, "inspect", tmp_path / "out")
    assert "layers/0/kernel" in text and "int4 g8" in text and "rel. error" not in text
    recipe.write_text('[[rule]]\nwhere = "embed"\nquantize = {format = "int8"}')
    text = run(capsys, "compress", tmp_path / "out", recipe, tmp_path / "more")
    assert "of int8" in text and "int4 g8" in text


def test_inspect_reports_as_json(ckpt, capsys):
    found = json.loads(run(capsys, "inspect", ckpt, "--json"))
    rows = {row["path"]: row for row in found["leaves"]}
    assert rows["layers/0/kernel"]["shape"] == [16, 8]
    assert rows["half"]["stored_bytes"] == 6
    assert found["total"]["stored_bytes"] == jc.nbytes(params())


@pytest.mark.parametrize("split", [False, True])
def test_safetensors_of_pytorch_have_their_output_axis_first(split, recipe, tmp_path, capsys):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 16)).astype(np.float32)
    tensors = {"model.0.kernel": w, "model.0.bias": np.ones(8, jnp.bfloat16)}
    recipe.write_text('[[rule]]\nwhere = "**/kernel"\nquantize = {format = "int4", group_size = 8}')
    source = tmp_path / "model"
    source.mkdir()
    if split:
        for i, (key, value) in enumerate(tensors.items()):
            save_file({key: value}, source / f"part{i}.safetensors", metadata={"format": "pt"})
    else:
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        source = source / "model.safetensors"
    assert "model/0/kernel" in run(capsys, "inspect", source)
    run(capsys, "compress", source, recipe, tmp_path / "out")
    found = jc.load(tmp_path / "out")["model"]["0"]
    assert isinstance(found["kernel"], QuantizedArray)
    assert found["kernel"].scale.shape == (8, 2)
    assert found["bias"].dtype == jnp.bfloat16
    transposed = jc.compress({"kernel": jnp.asarray(w.T)}, jc.quantize("int4", group_size=8))[
        "kernel"
    ]
    np.testing.assert_array_equal(found["kernel"].codes, transposed.codes.T)
    run(capsys, "compress", source, recipe, tmp_path / "out", "--overwrite", "--layout", "in,out")
    assert jc.load(tmp_path / "out")["model"]["0"]["kernel"].scale.shape == (1, 16)


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


def test_a_dry_run_reports_and_writes_nothing(recipe, tmp_path, capsys):
    jc.save(tmp_path / "ckpt", params())
    args = ("compress", tmp_path / "ckpt", recipe, tmp_path / "out", "--json")
    found = json.loads(run(capsys, *args, "--dry-run"))
    assert not (tmp_path / "out").exists()
    assert found == json.loads(run(capsys, *args))
    small = jc.load(tmp_path / "out")
    assert found["total"]["stored_bytes"] == jc.nbytes(small)
    assert found["total"]["dense_bytes"] == jc.nbytes(params())
    main([str(a) for a in (*args[:3], tmp_path / "dry", "--dry-run")])
    done = capsys.readouterr()
    before, after = jc.nbytes(params()), jc.nbytes(small)
    assert f"{after:,} bytes in the place of {before:,} dense ones; nothing was" in done.err
    assert "dense bytes" in done.out


def test_the_layout_that_is_assumed_is_shown(recipe, tmp_path, capsys):
    w = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    recipe.write_text('[[rule]]\nquantize = {format = "int8"}')
    for kind, metadata in {"flax": None, "torch": {"format": "pt"}}.items():
        save_file({"fc.weight": w}, tmp_path / f"{kind}.safetensors", metadata=metadata)
    shown = {"flax": "[in, out]", "torch": "[out, in]"}
    for kind, given, want in (
        ("flax", (), "[in, out]"),
        ("torch", (), "[out, in]"),
        ("flax", ("--layout", "out,in"), "[out, in]"),
        ("torch", ("--layout", "in,out"), "[in, out]"),
    ):
        out = tmp_path / f"{kind}{len(given)}"
        source = tmp_path / f"{kind}.safetensors"
        assert main(["compress", str(source), str(recipe), str(out), *given]) == 0
        done = capsys.readouterr()
        assert want in done.out
        assert (f"taken for {shown[kind]}" in done.err) == (not given)
        scale = jc.load(out)["fc"]["weight"].scale.shape
        assert scale == ((16, 1) if want == "[out, in]" else (1, 8))
    with pytest.raises(SystemExit) as stopped:
        main(["compress", str(source), str(recipe), str(out), "--layout", "torch"])
    assert stopped.value.code == 2 and "in,out" in capsys.readouterr().err


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


def test_ctrl_c_leaves_one_line(recipe, tmp_path, capsys, monkeypatch):
    jc.save(tmp_path / "ckpt", params())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxopt_compress.cli.leaf_report", interrupt)
    args = ("compress", tmp_path / "ckpt", recipe, tmp_path / "out")
    assert main([str(a) for a in args]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert not (tmp_path / "out").exists()


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    version = importlib.metadata.version("jaxopt-compress")
    assert capsys.readouterr().out == f"jaxopt-compress {version}\n"


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


def test_coded_checkpoints_hold_the_same(recipe, tmp_path, capsys):
    jc.save(tmp_path / "ckpt", params())
    run(capsys, "compress", tmp_path / "ckpt", recipe, tmp_path / "out", "--coding", "context")
    run(capsys, "compress", tmp_path / "ckpt", recipe, tmp_path / "plain")
    assert list((tmp_path / "out").glob("data-*/chunks-0"))
    found, plain = (jc.load(tmp_path / name) for name in ("out", "plain"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


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
