"""Forms whose products kernels take, and these kernels run step by step."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress import kernels
from jaxopt_compress.kernels import gpu_dots, tpu_dots

# Where XLA would write the dense weight: tables, small floats, words of codes, zero points.
FORMS = {
    "nf4": jc.quantize("nf4", group_size=128),
    "mxfp4": jc.quantize("mxfp4"),
    "nvfp4": jc.quantize("nvfp4"),
    "int4 in groups": jc.quantize("int4", group_size=128),
    "int8 in groups": jc.quantize("int8", group_size=128),
    "uint4 in groups": jc.quantize("uint4", group_size=128, symmetric=False),
    "int3": jc.quantize("int3"),
    "uint5": jc.quantize("uint5", symmetric=False),
    "uint6 in groups": jc.quantize("uint6", group_size=128, symmetric=False),
    "int3 with zero points": jc.quantize("int3", symmetric=False),
    "binary": jc.quantize("binary"),
    "int4 in groups x int8": jc.quantize("int4", group_size=128, activations="int8"),
    "uint4 in groups x int8": jc.quantize("uint4", 128, symmetric=False, activations="int8"),
    "int3 x int8": jc.quantize("int3", activations="int8"),
    "binary x int8": jc.quantize("binary", activations="int8"),
}

# Beyond these, what XLA for GPUs would write out.
ON_GPUS = FORMS | {
    "int4": jc.quantize("int4"),
    "uint8": jc.quantize("uint8", symmetric=False),
    "int2": jc.quantize("int2"),
}
FUSED = {name: jc.quantize(name) for name in ("int8", "float8_e4m3fn")}
# What it fuses or multiplies as it is, but for layers of a stack: these it would cut out, or turn.
IN_STACKS = FUSED | {
    "int8 x int8": jc.quantize("int8", activations="int8"),
    "int4 x int8": jc.quantize("int4", activations="int8"),
    "float8 x float8": jc.quantize("float8_e4m3fn", activations="float8_e4m3fn"),
}
CASES = [("tpu", name) for name in FORMS] + [("cuda", name) for name in ON_GPUS]


def run_as_on(platform, monkeypatch):
    """Runs the kernels of a platform step by step on this one."""
    there = lambda forms, default, *args: forms.get(platform, default)(*args)
    monkeypatch.setattr(sys.modules[kernels.matmul.__module__], "on_each_platform", there)
    for dots, name in (
        (tpu_dots, "decoded_dot"),
        (tpu_dots, "integer_dot"),
        (gpu_dots, "decoded_dot"),
        (gpu_dots, "integer_dot"),
    ):
        kernel = getattr(dots, name)
        step_by_step = lambda *a, kernel=kernel, **given: kernel(*a, **given | {"interpret": True})
        monkeypatch.setattr(dots, name, step_by_step)


def check_gradients(platform, run, small, x, monkeypatch):
    floats, rest = jc.partition(small)

    def gradients(**options):
        fn = jc.lift(run, "error", **options)
        loss = lambda floats, x: (fn(jc.combine(floats, rest), x).astype(jnp.float32) ** 2).sum()
        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(floats, x))

    expected = gradients()
    run_as_on(platform, monkeypatch)
    for own, want in zip(gradients(pallas=True), expected, strict=True):
        own, want = np.asarray(own, np.float32), np.asarray(want, np.float32)
        # Four layers, the results of which are rounded apart, to 8 bits and to bfloat16.
        assert np.linalg.norm(own - want) < 2.0**-4 * np.linalg.norm(want)
