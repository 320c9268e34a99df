"""Quantized safetensors of other libraries, written here by their rules, word by word."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxopt_compress as jc
from jaxopt_compress.storage.interchange.fields import pack_words, unpack_words

KNOWN = pathlib.Path(__file__).parents[2] / "known_answers"
OUT, IN, GROUP = 24, 64, 16


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_those_of_compressed_tensors(bits):
    known = np.load(KNOWN / "compressed_tensors.npz")
    codes, words = known[f"int{bits}/codes"], known[f"int{bits}/packed_axis1"]
    shifted = (codes.astype(int) + 2 ** (bits - 1)).astype(np.uint8)
    np.testing.assert_array_equal(pack_words(shifted, bits), words)
    np.testing.assert_array_equal(unpack_words(words, bits, codes.shape[1]), shifted)


def numbers(seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (IN, OUT))
    zeros = rng.integers(0, 15, (IN // GROUP, OUT))
    scales = rng.uniform(0.1, 1, (IN // GROUP, OUT)).astype(np.float16)
    return codes, zeros, scales


def dense(codes, zeros, scales, order):
    """[in, out] in float64, one entry after the other."""
    return (codes - zeros[order]) * scales.astype(float)[order]


def gptq_words(codes, axis):
    """As AutoGPTQ packs: eight along an axis, the first one lowest."""
    moved = np.moveaxis(codes, axis, -1).reshape(-1, 8)
    words = [sum(int(c) << (4 * i) for i, c in enumerate(eight)) for eight in moved]
    shape = list(np.moveaxis(codes, axis, -1).shape)
    shape[-1] //= 8
    return np.moveaxis(np.array(words, np.uint32).view(np.int32).reshape(shape), -1, axis)


def write(folder, tensors, config):
    folder.mkdir()
    dense = {"fc.bias": np.ones(OUT, np.float16), "norm.weight": np.ones(3, np.float32)}
    contiguous = {k: np.ascontiguousarray(v) for k, v in (tensors | dense).items()}
    save_file(contiguous, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def check(folder, want, kind=jc.QuantizedArray):
    found = jc.load_safetensors(folder)
    assert set(found) == {"fc", "norm"} and set(found["fc"]) == {"weight", "bias"}
    leaf = found["fc"]["weight"]
    assert isinstance(leaf, kind) and leaf.shape == (OUT, IN)
    value = np.asarray(leaf.materialize() if kind is not jnp.ndarray else leaf, float)
    # Steps of float16: one rounding of the product.
    np.testing.assert_allclose(value, want.T, rtol=2**-10)
    return leaf


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq(form, tmp_path):
    codes, zeros, scales = numbers()
    order = np.arange(IN) // GROUP
    less = 1 if form == "gptq" else 0
    tensors = {
        "fc.qweight": gptq_words(codes, 0),
        "fc.qzeros": gptq_words(zeros, 1),
        "fc.scales": scales,
        "fc.g_idx": order.astype(np.int32),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": form}
    write(tmp_path / "m", tensors, config)
    leaf = check(tmp_path / "m", dense(codes, zeros + less, scales, order))
    assert leaf.describe() == "uint4 g16" and leaf.scale.dtype == jnp.float16


def test_gptq_in_another_order_is_dense_with_a_warning(tmp_path):
    codes, zeros, scales = numbers()
    order = np.random.default_rng(1).permutation(np.arange(IN) // GROUP)
    tensors = {
        "fc.qweight": gptq_words(codes, 0),
        "fc.qzeros": gptq_words(zeros, 1),
        "fc.scales": scales,
        "fc.g_idx": order.astype(np.int32),
    }
    write(tmp_path / "m", tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP})
    with pytest.warns(UserWarning, match="'fc/weight' comes back dense"):
        check(tmp_path / "m", dense(codes, zeros + 1, scales, order), jnp.ndarray)


def awq_words(x):
    """Nibbles of a word, lowest first, hold the columns 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    shuffled = x.reshape(len(x), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape)
    return gptq_words(shuffled, 1)


def test_awq(tmp_path):
    codes, zeros, scales = numbers()
    tensors = {"fc.qweight": awq_words(codes), "fc.qzeros": awq_words(zeros), "fc.scales": scales}
    write(tmp_path / "m", tensors, {"quant_method": "awq", "bits": 4, "group_size": GROUP})
    check(tmp_path / "m", dense(codes, zeros, scales, np.arange(IN) // GROUP))


@pytest.mark.parametrize("key", ["group_size", "q_group_size"])
def test_awq_with_a_short_last_group(key, tmp_path):
    """Groups of 24, 24 and 16 inputs: their size is none that 64 over 3 could tell."""
    codes, zeros, scales = numbers()
    zeros, scales = zeros[:3], scales[:3] * np.float16([[1], [4], [16]])
    tensors = {"fc.qweight": awq_words(codes), "fc.qzeros": awq_words(zeros), "fc.scales": scales}
    write(tmp_path / "m", tensors, {"quant_method": "awq", "bits": 4, key: 24})
    check(tmp_path / "m", dense(codes, zeros, scales, np.arange(IN) // 24))


METHODS = {
    "int4 groups": jc.quantize("int4", group_size=GROUP),
    "int4 asymmetric": jc.quantize("int4", group_size=GROUP, symmetric=False),
    "int3": jc.quantize("int3"),
    "int8": jc.quantize("int8"),
    "w8a8": jc.quantize("int8", activations="int8"),
}


@pytest.mark.fast("out,in-int4 asymmetric", "in,out-w8a8")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", ["out,in", "in,out"])
def test_what_is_written_is_read(name, layout, tmp_path):
    w = np.random.default_rng(0).normal(size=(OUT, IN)).astype(np.float32)
    w = w * np.exp(np.random.default_rng(1).normal(size=(OUT, 1))).astype(np.float32)
    params = {"fc": {"weight": jnp.asarray(w if layout == "out,in" else w.T)}}
    small = jc.compress(params, METHODS[name], layout=layout)
    jc.save_safetensors(tmp_path / "m", small | {"norm": jnp.ones(3)}, layout=layout)
    found = jc.load_safetensors(tmp_path / "m")
    ours, theirs = small["fc"]["weight"], found["fc"]["weight"]
    assert type(ours) is type(theirs)
    turn = np.asarray if layout == "out,in" else np.transpose
    want, got = (np.asarray(x.materialize()) for x in (ours, theirs))
    np.testing.assert_array_equal(got, turn(want))
    np.testing.assert_array_equal(found["norm"], np.ones(3))


def test_leaves_of_one_tree_keep_their_own_widths_and_inputs(tmp_path):
    """Their groups are told apart by targets: by widths alone they are not."""
    widths = {"a": 8, "b": 8, "c": IN, "d": IN}
    rng = np.random.default_rng(0)
    w = {
        k: {"weight": jnp.asarray(rng.normal(size=(OUT, n)), jnp.float32)}
        for k, n in widths.items()
    }
    recipe = {"a/*": jc.quantize("int3"), "b/*": jc.quantize("int4"), "c/*": jc.quantize("int8")}
    small = jc.compress(w, recipe | {"d/*": METHODS["w8a8"]}, layout="out,in")
    for tree in (small, dict(reversed(small.items()))):
        jc.save_safetensors(tmp_path / "m", tree, overwrite=True)
        found = jc.load_safetensors(tmp_path / "m")
        for name, own in small.items():
            assert type(found[name]["weight"]) is type(own["weight"])
            want, got = (np.asarray(x["weight"].materialize()) for x in (own, found[name]))
            np.testing.assert_array_equal(got, want)


def test_a_folder_keeps_the_config_of_its_model_and_is_not_read_past(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "quantization_config": {}}))
    params = {"fc": {"weight": jnp.ones((OUT, IN))}, "gate": jnp.float32(2.0)}
    small = jc.compress(params, jc.quantize("int4", where="fc/*"), layout="out,in")
    jc.save_safetensors(folder, small, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 64
    assert jc.load_safetensors(folder)["gate"].shape == ()
    jc.save_safetensors(folder, params, overwrite=True)
    assert json.loads((folder / "config.json").read_text()) == {"hidden_size": 64}
    np.testing.assert_array_equal(jc.load_safetensors(folder)["fc"]["weight"], np.ones((OUT, IN)))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"index\.json"):
        jc.save_safetensors(folder, params, overwrite=True)
    with pytest.raises(ValueError, match=r"another leaf is 'a\.b'"):
        jc.save_safetensors(tmp_path / "n", {"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}})


def test_tensors_have_the_names_and_forms_of_compressed_tensors(tmp_path):
    w = {"a": {"weight": jnp.asarray(np.random.default_rng(0).normal(size=(OUT, IN)), jnp.float32)}}
    jc.save_safetensors(tmp_path / "m", jc.compress(w, METHODS["int4 asymmetric"], layout="out,in"))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert {k: (x.dtype.name, x.shape) for k, x in tensors.items()} == {
        "a.weight_packed": ("int32", (OUT, IN // 8)),
        "a.weight_scale": ("float32", (OUT, IN // GROUP)),
        "a.weight_shape": ("int64", (2,)),
        "a.weight_zero_point": ("int32", (OUT // 8, IN // GROUP)),
    }
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (config["format"], group["targets"]) == ("pack-quantized", ["a"])
    assert group["weights"]["group_size"] == GROUP and not group["weights"]["symmetric"]


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        (jc.quantize("nf4"), "'fc/weight' of shape .* nf4 is no format of at most 8-bit integers"),
        (jc.low_rank(rank=2), "'fc/weight' of shape .* LowRankArray"),
        (jc.quantize("int8", activations=jc.activations("int4")), "only activations in int8"),
    ],
)
def test_forms_without_a_counterpart_are_refused(compression, message, tmp_path):
    params = {"fc": {"weight": jnp.ones((OUT, IN))}}
    small = jc.compress(params, compression, layout="out,in")
    with pytest.raises(ValueError, match=message):
        jc.save_safetensors(tmp_path / "m", small)
    assert not (tmp_path / "m").exists()


def test_unknown_methods_and_torn_tensors_are_refused(tmp_path):
    codes, _, scales = numbers()
    write(tmp_path / "m", {}, {"quant_method": "hqq"})
    with pytest.raises(ValueError, match="by 'hqq' cannot be read: known are gptq, awq"):
        jc.load_safetensors(tmp_path / "m")
    tensors = {"fc.qweight": gptq_words(codes, 0), "fc.scales": scales}
    write(tmp_path / "n", tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"'fc/weight' of .*qzeros"):
        jc.load_safetensors(tmp_path / "n")


@pytest.mark.parametrize("name", ["gptq2", "gptq3", "gptq4", "gptq8", "awq4"])
def test_weights_that_other_packages_packed(name, tmp_path):
    """Codes as AutoGPTQ and AutoAWQ were given them, and weights up to the rounding of steps."""
    known = np.load(KNOWN / "packed.npz")
    own = {k.partition("/")[2]: known[k] for k in known if k.startswith(f"{name}/")}
    codes, want = own.pop("codes"), own.pop("dequantized")
    tensors = {f"fc.{k}": np.ascontiguousarray(v) for k, v in own.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": name[:-1], "bits": int(name[-1]), "group_size": GROUP}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    leaf = jc.load_safetensors(tmp_path)["fc"]["weight"]
    np.testing.assert_array_equal(np.asarray(leaf.unpacked()).astype(int), codes)
    np.testing.assert_allclose(np.asarray(leaf.materialize(), np.float32), want, rtol=2**-10)


def test_a_shorter_last_group_has_the_scale_of_its_own_columns(tmp_path):
    """The size of groups is the configuration's, not the columns over the number of scales."""
    codes = np.random.default_rng(0).integers(-127, 128, (4, 100)).astype(np.int8)
    scale = np.tile(np.float32([1, 10, 100, 1000]), (4, 1))
    tensors = {"w.weight": codes, "w.weight_scale": scale}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": 32}}

    def read(weights):
        method = {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {**group, "weights": weights}},
        }
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": method}))
        return jax.tree.leaves(jc.materialize(jc.load_safetensors(tmp_path)))[0]

    want = codes * scale[:, np.arange(100) // 32]
    np.testing.assert_array_equal(np.asarray(read(group["weights"])), want)
    tensors["w.weight"] = codes[:, :99]
    with pytest.raises(ValueError, match=r"4 scales for 99 columns: .* missing"):
        read({"num_bits": 8})
