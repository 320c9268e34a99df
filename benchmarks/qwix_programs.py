"""Four dense layers as a linen module, quantized by this library and by Qwix, from shapes alone.

Qwix is no dependency: its programs are there where it is installed. It takes layers one by one (it
cannot quantize a scanned stack), and so they are here.
"""

import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import target_programs as programs
from jax.sharding import PartitionSpec as P

BFLOAT16 = jnp.bfloat16
QWIX = ", Qwix"
# This library's name of a form -> Qwix's rule. Steps are stored as bfloat16 by Qwix, like the
# weights that they come from; ours too, unless the format says how.
RULES = {
    "int8": {"weight_qtype": "int8"},
    "int4": {"weight_qtype": "int4"},
    "int4 g128": {"weight_qtype": "int4", "tile_size": 128},
    "nf4 g128": {"weight_qtype": "nf4", "tile_size": 128},
    "float8_e4m3fn": {"weight_qtype": "float8_e4m3fn"},
    "mxfp8": {"weight_qtype": "mxfp8", "tile_size": 32},
    "mxfp4": {"weight_qtype": "mxfp4", "tile_size": 32},
    "nvfp4": {"weight_qtype": "nvfp4", "tile_size": 16},
    "int8 x int8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "int4 x int8": {"weight_qtype": "int4", "act_qtype": "int8"},
    "int4 g128 x int8": {"weight_qtype": "int4", "act_qtype": "int8", "tile_size": 128},
    "nf4 g128 x int8": {"weight_qtype": "nf4", "act_qtype": "int8", "tile_size": 128},
    "float8_e4m3fn x float8_e4m3fn": {
        "weight_qtype": "float8_e4m3fn",
        "act_qtype": "float8_e4m3fn",
    },
    # Further groups.
    "int4 g32": {"weight_qtype": "int4", "tile_size": 32},
    "int4 g64": {"weight_qtype": "int4", "tile_size": 64},
    "int4 g256": {"weight_qtype": "int4", "tile_size": 256},
    "nf4 g32": {"weight_qtype": "nf4", "tile_size": 32},
    "nf4 g64": {"weight_qtype": "nf4", "tile_size": 64},
    "nf4 g256": {"weight_qtype": "nf4", "tile_size": 256},
}
MORE_GROUPS = ("int4 g32", "int4 g64", "int4 g256", "nf4 g32", "nf4 g64", "nf4 g256")
# Steps of these are those of the format.
OWN_STEPS = ("bfloat16", "mxfp8", "mxfp4", "nvfp4")
# This library's default, for which Qwix has no counterpart.
WIDE_STEPS = ("int8, float32 steps", "int4 g128, float32 steps")


def names(everything: bool = True) -> list[str]:
    """The weights to compile, ours before Qwix's; all sizes of groups only on demand."""
    rules = [name for name in RULES if everything or name not in MORE_GROUPS]
    pairs = [f"{name}{maker}" for name in rules for maker in ("", QWIX)]
    return ["bfloat16", *pairs, *WIDE_STEPS]


def installed() -> bool:
    """Whether Qwix is there."""
    return importlib.util.find_spec("qwix") is not None


class Layers(nn.Module):
    """Dense layers without bias in bfloat16, and a function between them as in any network."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.relu(x) if i else x
            x = nn.Dense(width, use_bias=False, dtype=BFLOAT16, param_dtype=BFLOAT16)(x)
        return x


def unrolled(weights: str, rows: int) -> programs.Program:
    """The layers, their weights stored as a name says, by Qwix if the name ends so."""
    (depth, columns), x = programs.sizes_for(rows)
    model = Layers((columns, depth) * 2)
    key = jax.random.key(0)
    if not weights.endswith(QWIX):
        params = jax.eval_shape(model.init, key, x)
        fn = lambda params, x: model.apply(params, x)
        own = weights in (*OWN_STEPS, *WIDE_STEPS)
        name = weights if own else f"{weights}, bfloat16 steps"
        return programs.lifted(fn, params, x, name, _whole, (depth * columns,), pallas=True)
    import qwix

    rule = qwix.QuantizationRule(module_path=".*", **RULES[weights.removesuffix(QWIX)])
    quantized = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    state = jax.eval_shape(quantized.init, key, x)
    leaves, treedef = jax.tree.flatten(state)

    def run(leaves: list[Any], x: jax.Array) -> jax.Array:
        return quantized.apply(treedef.unflatten(leaves), x)

    stored = programs.hlo_name(max(leaves, key=lambda leaf: leaf.size).dtype)
    return programs.Program(run, leaves, x, _whole, (depth * columns,), stored)


def _whole(path: str, ndim: int) -> P:
    del path, ndim
    return P()
