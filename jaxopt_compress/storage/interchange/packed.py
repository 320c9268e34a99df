"""Tensors of GPTQ, AWQ and compressed-tensors as `QuantizedArray` leaves, [out, in]."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import InputQuantizedArray
from jaxopt_compress.storage.interchange import sparse
from jaxopt_compress.storage.interchange.fields import Linear, leaf_of, unpack_words
from jaxopt_compress.typing import Leaf

# Which of eight neighbouring columns AWQ keeps in which four bits of a word, lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# Reads one tensor by its name in the checkpoint.
Read = Callable[[str], np.ndarray]


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a ``config.json`` says of quantized weights; None if nothing.

    Raises:
        ValueError: They are quantized by a method that is not known here.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    method = found.get("quant_method")
    if method not in READERS:
        raise ValueError(
            f"weights quantized by {method!r} cannot be read: known are {', '.join(READERS)}"
        )
    kind = (found.get("sparsity_config") or {}).get("format", "dense")
    if kind not in ("dense", sparse.FORMAT):
        raise ValueError(f"sparse weights as {kind!r} cannot be read: known is {sparse.FORMAT}")
    return dict(found)


def fields_of(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tensors that make up each quantized weight, by its name, which ends in ``.weight``."""
    ending, others, _ = READERS[config["quant_method"]]
    found = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        if last not in ending or (last == "weight" and f"{stem}.weight_scale" not in names):
            continue
        more = "weight_scale", "weight_zero_point"
        given = others if last != "compressed" else (*sparse.NAMES[1:], *more)
        own = [f"{stem}.{other}" for other in given if f"{stem}.{other}" in names]
        found[f"{stem}.weight"] = (name, *own)
    return found


def read_leaf(path: str, names: tuple[str, ...], read: Read, config: Mapping[str, Any]) -> Leaf:
    """One quantized weight.

    Raises:
        ValueError: Its tensors do not fit each other or the configuration; names it.
    """
    tensors = {name.rpartition(".")[2]: read(name) for name in names}
    try:
        return READERS[config["quant_method"]][2](path, tensors, config)
    except (KeyError, ValueError, TypeError) as error:
        shapes = {k: f"{x.dtype}{list(x.shape)}" for k, x in tensors.items()}
        raise ValueError(f"{path!r} of {shapes} cannot be read: {error}") from error


def _gptq(path: str, tensors: dict[str, np.ndarray], config: Mapping[str, Any]) -> Leaf:
    bits = int(config["bits"])
    scale = tensors["scales"].T
    out, groups = scale.shape
    words = tensors["qweight"].T
    codes = unpack_words(words, bits, words.shape[1] * 32 // bits)
    zero = unpack_words(tensors["qzeros"], bits, out).T
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        # The first format keeps one less, so that 15 stands for 16 or, by overflow, -1 for 0.
        zero = zero + np.uint8(1)
    group = _group(codes.shape[1], groups, [config.get("group_size")])
    order, size = tensors.get("g_idx"), group or codes.shape[1]
    if order is not None and not np.array_equal(order, np.arange(codes.shape[1]) // size):
        warnings.warn(
            f"{path!r} comes back dense: its groups are of columns that do not follow each other "
            "(desc_act), which no QuantizedArray says",
            stacklevel=2,
        )
        scales, zeros = (np.asarray(x, np.float32)[:, order] for x in (scale, zero))
        return jnp.asarray((codes - zeros) * scales, scale.dtype)
    return leaf_of(Linear(codes, scale, zero, bits, group), signed=False)


def _awq(path: str, tensors: dict[str, np.ndarray], config: Mapping[str, Any]) -> Leaf:
    del path
    if int(config.get("bits", config.get("w_bit", 4))) != 4:
        raise ValueError("AWQ of other widths than 4 bits")
    scale = tensors["scales"].T
    out, groups = scale.shape
    place = np.argsort(_AWQ_ORDER)

    def columns(words: np.ndarray) -> np.ndarray:
        codes = unpack_words(words, 4, out)
        return codes.reshape(len(codes), out // 8, 8)[..., place].reshape(len(codes), out).T

    codes, zero = columns(tensors["qweight"]), columns(tensors["qzeros"])
    asked = [config.get("group_size"), config.get("q_group_size")]
    group = _group(codes.shape[1], groups, asked)
    return leaf_of(Linear(codes, scale, zero, 4, group), signed=False)


def _group(columns: int, groups: int, asked: Sequence[int | str | None]) -> int | None:
    """How many columns share a scale, the last ones perhaps fewer; None for all.

    Raises:
        ValueError: No size that the configuration names makes so many groups, or several do.
    """
    if groups == 1:
        return None
    named = {int(size) for size in asked if size is not None and int(size) > 0}
    fits = sorted(size for size in named if -(-columns // size) == groups)
    if len(fits) == 1:
        return fits[0]
    if fits or columns % groups:
        raise ValueError(
            f"{groups} scales for {columns} columns: the configuration's sizes of groups are "
            f"{sorted(named) or 'missing'}, and one of them has to make so many"
        )
    return columns // groups


def _compressed(path: str, tensors: dict[str, np.ndarray], config: Mapping[str, Any]) -> Leaf:
    if "compressed" in tensors:
        if "weight_scale" in tensors or tensors["compressed"].dtype.kind in "iu":
            raise ValueError("2:4 weights that are quantized too: only floats can be read")
        return sparse.leaf_of(tensors)
    scale = tensors["weight_scale"]
    zero = tensors.get("weight_zero_point")
    if "weight_packed" not in tensors:
        codes = tensors["weight"]
        if codes.dtype != np.int8:
            raise ValueError(f"weights of {codes.dtype} with a scale")
        bits = 8
    else:
        words = tensors["weight_packed"]
        out, size = map(int, tensors["weight_shape"])
        widths = {int(group["weights"]["num_bits"]) for group in _groups(path, config)}
        fits = sorted(bits for bits in widths if -(-size * bits // 32) == words.shape[1])
        if not fits:
            raise ValueError(
                f"{words.shape[1]} words hold no {size} codes of {sorted(widths)} bits"
            )
        if len(fits) > 1:
            raise ValueError(f"{size} codes of {fits} bits take as many words: name it in targets")
        bits, half = fits[0], 1 << (fits[0] - 1)
        codes = (unpack_words(words, bits, size).astype(np.int16) - half).astype(np.int8)
        if zero is not None and zero.dtype == np.int32:
            zero = unpack_words(np.ascontiguousarray(zero.T), bits, out).T.astype(np.int16) - half
    order = tensors.get("weight_g_idx")
    groups = scale.shape[1] if scale.ndim == 2 else 1
    asked = [each["weights"].get("group_size") for each in _groups(path, config)]
    group = _group(codes.shape[1], groups, asked)
    if order is not None and (order >= 0).all() and group is not None:
        if not np.array_equal(order, np.arange(codes.shape[1]) // group):
            raise ValueError("its groups are of columns that do not follow each other")
    scale = np.broadcast_to(scale.reshape(-1, groups), (codes.shape[0], groups))
    if zero is not None:
        zero = np.broadcast_to(zero.reshape(-1, groups), scale.shape)
    if zero is not None and not np.any(zero):
        zero = None
    leaf = leaf_of(Linear(codes, scale, zero, bits, group))
    return InputQuantizedArray(leaf, None, "int8") if _rounds_inputs(path, config, bits) else leaf


def _groups(path: str, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups whose targets name the weight; all where these are classes, such as Linear."""
    every = list(config["config_groups"].values())
    stem = path.removesuffix("/weight").replace("/", ".")
    hit = lambda t: bool(re.match(t[3:], stem)) if t.startswith("re:") else t == stem
    return [g for g in every if any(map(hit, g.get("targets") or ()))] or every


def _rounds_inputs(path: str, config: Mapping[str, Any], bits: int) -> bool:
    """Whether activations are rounded to int8 by each row's own range.

    Raises:
        ValueError: They are rounded otherwise, or groups disagree.
    """
    groups = [g for g in _groups(path, config) if g["weights"]["num_bits"] == bits]
    kinds = [g.get("input_activations") for g in groups]
    found = kinds[0] if kinds else None
    if any(kind != found for kind in kinds):
        raise ValueError(
            "activations are rounded in one group and not in another: name it in targets"
        )
    if not found:
        return False
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    if {k: found.get(k) for k in wanted} != wanted or found.get("strategy") != "token":
        raise ValueError("activations are rounded, and not to int8 by the range of each token")
    return True


# By quant_method: the last names of tensors that hold codes, those of the others, and the reader.
READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[..., Leaf]]] = {
    "gptq": (("qweight",), ("qzeros", "scales", "g_idx"), _gptq),
    "awq": (("qweight",), ("qzeros", "scales"), _awq),
    "compressed-tensors": (
        ("weight_packed", "weight", "compressed"),
        ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        _compressed,
    ),
}
