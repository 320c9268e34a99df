"""Writes the known answers of independent quantizers; README.md says which and how."""

import argparse
from importlib.metadata import version
from pathlib import Path

import bitsandbytes
import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import qwix
import torch
from compressed_tensors.compressors.pack_quantized import helpers
from torchao.prototype.mx_formats import config, mx_tensor, nvfp4_tensor
from torchao.quantization import qat
from torchao.quantization import quant_primitives as ao

SMALL_FLOATS = ["float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn"]
SMALL_FLOATS += ["float4_e2m1fn", "float8_e8m0fnu"]
PACKAGES = "bitsandbytes compressed_tensors gguf jax jaxlib ml_dtypes numpy qwix torch torchao"


def levels(name):
    """Every value of a small float by its bit pattern, the nonnegative ties, and the maximum."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    values = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype="u1").view(dtype).astype("f4")
    above = np.unique(values[np.isfinite(values) & (values >= 0)]).astype(float)
    return values, ((above[1:] + above[:-1]) / 2).astype("f4"), above[-1]


def ties(rng, low, high, step=0.5, n=64):
    """Multiples of step that reach low and high in every 16: exact ties where the scale is 1."""
    row = rng.integers(round(low / step), round(high / step) + 1, n) * step
    row[::16], row[1::16] = high, low
    return row.astype("f4")


def matrix():
    """Rows (18, 64): README.md describes each."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((18, 64), "f4")
    x[1, ::13], x[3] = 30 * x[1, ::13], 1e-6 * x[3]
    x[2], x[3, :33], x[4] = 0, 0, 5 + rng.random(64)
    for row, top in enumerate((1.5, 3.5, 7.5, 15.5, 127.5), 5):
        x[row] = ties(rng, -top, top, 0.25 if top < 8 else 0.5)
    x[10], x[11] = ties(rng, -3, 12), ties(rng, -101, 154)
    for row, name in enumerate(SMALL_FLOATS[:5], 12):
        _, middle, top = levels(name)
        x[row] = rng.choice(middle, 64) * rng.choice([-1, 1], 64)
        x[row, ::16] = top
    x[12:14] *= np.array([[2.0**-8], [2.0**-15]])
    nf4 = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").numpy()
    x[17] = rng.choice((nf4[1:].astype(float) + nf4[:-1]) / 2, 64)
    x[17, ::16] = 1
    return x


def make_qwix(x):
    def case(name, group=None, method="absmax"):
        qtype = np.dtype(name) if name[:5] in ("int4", "int8", "float") else name
        axes = {"channelwise_axes": (0,), "tiled_axes": {1: group} if group else {}}
        q = qwix.quantize(jnp.asarray(x), qtype, **axes, calibration_method=method)
        dtype = "i4" if jnp.issubdtype(q.qvalue.dtype, jnp.integer) else "f4"
        zero = {} if q.zero_point is None else {"zero": np.asarray(q.zero_point).astype("i4")}
        parts = {"codes": np.asarray(q.qvalue).astype(dtype), "scale": q.scale}
        return parts | {"dequantized": qwix.dequantize(q)} | zero

    names = "int2 int3 int4 int5 int6 int7 int8 nf4 " + " ".join(SMALL_FLOATS[:2])
    out = {"x": x} | {f"{name}_channel": case(name) for name in names.split()}
    for name in "int4", "int8", "float4_e2m1fn", "nf4", "mxfp8", "mxfp4", "nvfp4":
        group = 16 if name == "nvfp4" else 32
        out[f"{name}_group{group}"] = case(name, group)
        if name[:3] == "int":
            out[f"{name}_asymmetric_channel"] = case(name, None, "minmax")
            out[f"{name}_asymmetric_group32"] = case(name, 32, "minmax")
    return out


def make_torchao(x):
    def case(mapping, block, low, high):
        value, dtype = torch.from_numpy(x), torch.int8 if low < 0 else torch.uint8
        kind = ao.MappingType[mapping]
        scale, zero = ao.choose_qparams_affine(value, kind, block, dtype, low, high, keepdim=True)
        codes = ao.quantize_affine(value, block, scale, zero, dtype, low, high)
        back = ao.dequantize_affine(codes, block, scale, zero, dtype, low, high)
        return {"codes": codes.int(), "scale": scale, "zero": zero.int(), "dequantized": back}

    out = {"x": x, "int8_tensor": case("SYMMETRIC", x.shape, -128, 127)}
    out["int4_noclip_group32"] = case("SYMMETRIC_NO_CLIPPING_ERR", (1, 32), -8, 7)
    out["int8_narrow_channel"] = case("SYMMETRIC", (1, 64), -127, 127)
    for bits in 2, 3, 4, 8:
        half = 2 ** (bits - 1)
        out[f"int{bits}_group32"] = case("SYMMETRIC", (1, 32), -half, half - 1)
        if bits > 3:
            out[f"int{bits}_channel"] = case("SYMMETRIC", (1, 64), -half, half - 1)
            out[f"int{bits}_asymmetric_token"] = case("ASYMMETRIC", (1, 64), -half, half - 1)
            out[f"uint{bits}_asymmetric_group32"] = case("ASYMMETRIC", (1, 32), 0, 2 * half - 1)
    return out


def make_microscaling(x):
    value, to_nvfp4 = torch.from_numpy(x), nvfp4_tensor.NVFP4Tensor.to_nvfp4
    scale = nvfp4_tensor.per_tensor_amax_to_scale(value.abs().max())
    results = {"nvfp4": to_nvfp4(value), "nvfp4_two_level": to_nvfp4(value, per_tensor_scale=scale)}
    kinds = torch.float8_e4m3fn, torch.float8_e5m2, "fp6_e2m3", "fp6_e3m2", torch.float4_e2m1fn_x2
    for name, kind in zip(SMALL_FLOATS[:5], kinds, strict=True):
        for mode in config.ScaleCalculationMode:
            results[f"{name}_{mode.value}"] = mx_tensor.MXTensor.to_mx(value, kind, 32, mode)
    out = {"x": x, "tensor_scale": scale}
    for name, q in results.items():
        codes = q.qdata.view(torch.uint8)
        if codes.shape != x.shape:
            codes = torch.stack([codes & 15, codes >> 4], -1).reshape(x.shape)
        out[name] = {"codes": codes, "scale_bits": q.scale.view(torch.uint8)}
        if not name.endswith(("ceil", "even")):
            out[name]["dequantized"] = q.dequantize(torch.float32)
    return out


def make_bitsandbytes(x):
    out, value = {"x": x}, torch.from_numpy(x)
    for name, double in ("nf4", False), ("nf4_double", True):
        options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": double}
        packed, state = bitsandbytes.functional.quantize_4bit(value, **options)
        codes = torch.stack([packed >> 4, packed & 15], -1).reshape(x.shape)
        out[name] = {"packed": packed, "codes": codes, "absmax": state.absmax}
        out[name]["dequantized"] = bitsandbytes.functional.dequantize_4bit(packed, state)
    second = {"absmax2": state.state2.absmax, "table2": state.state2.code, "offset": state.offset}
    return out | {"table": state.code, "nf4_double": out["nf4_double"] | second}


def make_gguf(x):
    rng = np.random.default_rng(1)
    spans = (-8, 7.5), (-16, 15.5), (-127, 126.5), (0, 15), (-3, 12), (0, 31), (-7.5, 6), (-6, 5)
    narrow = np.concatenate([x[:4].reshape(8, 32), [ties(rng, *span, n=32) for span in spans]])
    wide = [ties(rng, -1, 1, 0.25, 256), rng.standard_normal(256, "f4"), np.zeros(256, "f4")]
    out = {"x": narrow, "x_wide": np.stack(wide)}
    for name in "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0":
        kind = gguf.GGMLQuantizationType[name]
        raw = gguf.quants.quantize(out["x_wide" if name[0] == "T" else "x"], kind)
        back = gguf.quants.dequantize(raw, kind)
        halves = lambda at, raw=raw: raw[:, at:][:, :2].copy().view("f2").astype("f4")
        scale, low = halves(-2 if name[0] == "T" else 0), halves(2) if name[-1] == "1" else 0
        codes = np.rint((back - low) / np.where(scale == 0, 1, scale))
        if name in ("Q8_0", "MXFP4"):
            both = np.concatenate([raw[:, 1:] & 15, raw[:, 1:] >> 4], 1)
            codes = raw[:, 2:].view("i1") if name == "Q8_0" else both
        out[name] = {"blocks": raw, "codes": codes.astype("i4"), "dequantized": back}
        out[name] |= {"scale_bits": raw[:, :1]} if name == "MXFP4" else {"scale": scale}
        out[name] |= {"minimum": low} if name[-1] == "1" else {}
    return out


def make_ml_dtypes(_):
    out = {}
    for name in SMALL_FLOATS:
        rng, dtype = np.random.default_rng(2), np.dtype(getattr(ml_dtypes, name))
        table, middle, top = levels(name)
        smallest = np.log2(float(ml_dtypes.finfo(dtype).smallest_subnormal))
        x = np.exp2(rng.uniform(smallest - 2, np.log2(top), 500)).astype("f4")
        x = np.concatenate([x, middle, np.nextafter(middle, np.float32(0)), middle * 1.0000002])
        x *= 1 if name == "float8_e8m0fnu" else rng.choice(np.array([-1, 1], "f4"), x.size)
        limits = np.array([0, -0.0, -1, 1, 1.03, 1.04, 1.08, 2, np.inf, -np.inf, np.nan], "f4")
        limits[3:8] *= min(top, 1e38)
        for case, value in (name, x), (f"{name}_limits", limits):
            small = value.astype(dtype)
            out[case] = {"x": value, "bits": small.view("u1"), "rounded": small.astype("f4")}
        out[name]["table"] = table
    return out


def make_compressed_tensors(_):
    rng, out = np.random.default_rng(3), {}
    for bits in range(1, 9):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes = rng.integers(low, high + 1, (12, 40), "i1")
        codes[0, :8], codes[1] = np.clip(np.arange(-8, 0), low, high), high
        out[f"int{bits}"] = {"codes": codes}
        for axis in 0, 1:
            packed = helpers.pack_to_int32(torch.from_numpy(codes), bits, axis)
            back = helpers.unpack_from_int32(packed, bits, codes.shape, axis)
            assert back.tolist() == codes.tolist()
            out[f"int{bits}"][f"packed_axis{axis}"] = packed
    return out


def make_gradients(_):
    rng = np.random.default_rng(4)
    x, cotangent = rng.standard_normal((2, 6, 64), "f4")
    s, z, factor = 0.05 + 0.4 * rng.random(6), rng.uniform(0, 15, 6), 448**-0.5
    x[2], x[3], s[3] = 0, ties(rng, -1.875, 1.875, 0.0625), 0.25
    out = {"x": x, "cotangent": cotangent, "grad_factor": np.float32(factor)}
    through = lambda v, quantized: quantized.detach() + (v - v.detach())
    unit = lambda v: through(v, torch.round(v * 15) / 15)
    dorefa = lambda x, peak: 2 * unit(torch.tanh(x) / (2 * torch.tanh(peak).abs().max()) + 0.5) - 1
    intx = lambda *args, **where: qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(*args, **where))
    channel = torch._fake_quantize_learnable_per_channel_affine
    tensor = torch._fake_quantize_learnable_per_tensor_affine

    def lsq(x, s, offset, low, high):
        v = (x.T - offset) / s
        codes = torch.where((v > low) & (v < high), through(v, v.round()), v.detach())
        return (codes.clamp(low, high) * s + offset).T

    def pact(x, alpha):
        y = torch.where(x < 0, 0, torch.where(x < alpha, x, alpha))
        return through(y, torch.round(y * (15 / alpha)) * (alpha / 15))

    for name, function, learned in (
        ("ste_int4_group32", intx(torch.int4, group_size=32, is_symmetric=True), {}),
        ("ste_int4_asymmetric_group32", intx(torch.int4, group_size=32, is_symmetric=False), {}),
        ("ste_int8_asymmetric_token", intx(torch.int8, "per_token", is_symmetric=False), {}),
        ("lsq_channel_int4", lambda *a: channel(*a, 0, -8, 7, factor), {"scale": s, "zero": 0 * z}),
        ("lsq_channel_uint4_zero", lambda *a: channel(*a, 0, 0, 15, 1.0), {"scale": s, "zero": z}),
        ("lsq_tensor_int4", lambda *a: tensor(*a, -8, 7, factor), {"scale": s[:1], "zero": [0]}),
        ("lsq_paper_int4", lambda x, s: lsq(x, s, 0, -8, 7), {"scale": s}),
        ("lsq_plus_uint4", lambda *a: lsq(*a, 0, 15), {"scale": s, "offset": -s * z}),
        ("pact_4bit", pact, {"alpha": 1.25}),
        ("dorefa_weight_4bit", lambda x: dorefa(x, x), {}),
        ("dorefa_weight_4bit_detached", lambda x: dorefa(x, x.detach()), {}),
        ("dorefa_weight_1bit", lambda x: through(x, x.abs().mean().copysign(x)), {}),
        ("dorefa_activation_4bit", lambda x: unit(x.clamp(0, 1)), {}),
    ):
        learned = {k: np.asarray(v, "f4") for k, v in learned.items()}
        leaves = [torch.tensor(v, requires_grad=True) for v in (x, *learned.values())]
        y = function(*leaves)
        y.backward(torch.from_numpy(cotangent))
        grads = {f"grad_{k}": leaf.grad for k, leaf in zip(["x", *learned], leaves, strict=True)}
        out[name] = {"y": y.detach()} | grads | learned
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    versions = [f"{package}=={version(package)}" for package in PACKAGES.split()]
    for make in [f for name, f in globals().items() if name.startswith("make_")]:
        arrays = {"versions": versions}
        for key, value in make(matrix()).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            arrays |= {f"{key}/{k}".rstrip("/"): np.asarray(v) for k, v in parts}
        np.savez_compressed(folder / f"{make.__name__[5:]}.npz", **arrays)
    print(*versions)


if __name__ == "__main__":
    main()
