"""The command on checkpoints of every kind: what it writes, shows and reports."""

import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import jaxopt_compress as jc
from jaxopt_compress.__main__ import main
from jaxopt_compress.arrays import QuantizedArray
from tests.cli.command import params, run


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
    # The choices come in the order of a set, and lines break where the terminal ends.
    assert stopped.value.code == 2 and "in,out" in "".join(capsys.readouterr().err.split())


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    version = importlib.metadata.version("jaxopt-compress")
    assert capsys.readouterr().out == f"jaxopt-compress {version}\n"


def test_coded_checkpoints_hold_the_same(recipe, tmp_path, capsys):
    jc.save(tmp_path / "ckpt", params())
    run(capsys, "compress", tmp_path / "ckpt", recipe, tmp_path / "out", "--coding", "context")
    run(capsys, "compress", tmp_path / "ckpt", recipe, tmp_path / "plain")
    assert list((tmp_path / "out").glob("data-*/chunks-0"))
    found, plain = (jc.load(tmp_path / name) for name in ("out", "plain"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
