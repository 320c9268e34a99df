import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (object(), r"cannot save 'a/0', a object: .*replace it by None"),
        (np.array(["x"]), "no form for the dtype <U1"),
        (np.zeros(2, np.longdouble), "no form for the dtype float128"),
        ({1.5: 1}, r"cannot save the key 1.5 of 'a/0'"),
        ({1: 1, "1": 2}, "keys are of different types"),
    ],
)
def test_what_cannot_be_saved_is_named(leaf, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        jc.save(tmp_path / "ckpt", {"a": [leaf]})
    assert not (tmp_path / "ckpt").exists()


def test_saving_inside_of_jit_is_refused(tmp_path):
    with pytest.raises(TypeError, match="inside of jit"):
        jax.jit(lambda x: jc.save(tmp_path / "ckpt", {"w": x}))(1.0)


def test_paths_that_are_no_checkpoint_are_named(tmp_path):
    import orbax.checkpoint as ocp

    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing"):
        jc.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no checkpoint of jaxopt_compress"):
        jc.load(tmp_path / "empty")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="a checkpoint of another program"):
        jc.load(tmp_path / "plain")


def edit(path, change):
    file = path / "structure" / "metadata"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2 .* from before it was settled"),
        (lambda d: d.update(version=99), "version 99 .* reads up to 3: install a newer"),
        (lambda d: d.update(format="other"), "is no checkpoint of jaxopt_compress.save"),
        (lambda d: d.update(tree={"set": []}), r"be damaged: unknown kind of leaf.*'set'"),
        (
            lambda d: d["tree"]["dict"][0][1].update(leaf="Other"),
            "unknown compressed array 'Other'",
        ),
        (lambda d: d["tree"]["dict"][0][1]["static"].update(dtype="f7"), "unknown dtype 'f7'"),
        (
            lambda d: d["tree"]["dict"][0][1]["static"].update(group_size=3),
            "be damaged: .* does not fit",
        ),
        (lambda d: d["tree"]["dict"][0][1]["static"].update(new=3), "be damaged: .* has no new"),
        (lambda d: d["tree"]["dict"][0][1]["fields"]["codes"].pop("kind"), "be damaged: 'kind'"),
        (
            lambda d: d["tree"]["dict"][1][1].update(shape=[3]),
            r"be damaged: array \d is float32\[2\]",
        ),
        (lambda d: d["tree"]["dict"][1][1].update(array="99"), "damaged"),
    ],
)
def test_descriptions_that_cannot_be_right_are_refused(change, message, tmp_path):
    small = jc.compress({"w": jnp.ones((8, 4))}, jc.quantize("int4", group_size=4))
    jc.save(tmp_path / "ckpt", small | {"x": jnp.ones(2)})
    edit(tmp_path / "ckpt", change)
    with pytest.raises(ValueError, match=message):
        jc.load(tmp_path / "ckpt")


@pytest.mark.parametrize("victim", ["structure/metadata", "arrays/manifest.ocdbt"])
@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_damaged_files_are_reported(victim, how, tmp_path):
    jc.save(tmp_path / "ckpt", {"w": jnp.arange(1000.0)})
    file = tmp_path / "ckpt" / victim
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:7])
    with pytest.raises(ValueError, match=r"the checkpoint .*ckpt cannot be read"):
        jc.load(tmp_path / "ckpt")
