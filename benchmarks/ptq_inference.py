"""Inference after post-training quantization, beside Qwix where it is installed: MLPs.

python benchmarks/ptq_inference.py [--rounds 40] [--batch 1 128] [--width 512 2048] [--json]

Time per call over that of the float32 model, and over that of Qwix's version of the same model,
compiled and interleaved in one process; "CPU" is processor time, of which a busy machine takes less
away. Qwix is no dependency: without it its columns are empty.
"""

import argparse
import importlib.util
import os
import sys

import flax_models
import jax
import models
import timing

import jaxopt_compress as jc

LAYERS, GROUP = 4, 128
# Name -> this library's compression, and Qwix's rule.
VARIANTS = {
    "int8": (jc.quantize("int8"), {"weight_qtype": "int8"}),
    "int4 g128": (jc.quantize("int4", GROUP), {"weight_qtype": "int4", "tile_size": GROUP}),
    "nf4 g128": (jc.quantize("nf4", GROUP), {"weight_qtype": "nf4", "tile_size": GROUP}),
    "w8a8": (
        jc.quantize("int8", activations="int8"),
        {"weight_qtype": "int8", "act_qtype": "int8"},
    ),
}
# Weights that lie as [out, in], as those of PyTorch and Equinox do.
TRANSPOSED = "w8a8 (out, in)"
COLUMNS = {
    "ms": "ms",
    "ratio": "over float32",
    "cpu_ratio": "CPU",
    "qwix_ratio": "Qwix over float32",
    "qwix_cpu_ratio": "CPU",
    "over_qwix": "ours over Qwix",
    "cpu_over_qwix": "CPU",
}


def compressed(params, compression, x):
    """A call of `models.mlp` on compressed parameters."""
    uses = jc.uses(models.mlp, params, x)
    small = jc.compress(params, compression, uses=uses)
    return compile_call(jc.lift(models.mlp, on_fallback="error"), small, x)


def transposed(params, compression, x):
    """As `compressed`, of the same weights in the other order."""
    turned = lambda tree: jax.tree.map(lambda w: w.T, tree)
    fn = lambda params, x: models.mlp(turned(params), x)
    other = turned(params)
    small = jc.compress(other, compression, uses=jc.uses(fn, other, x))
    return compile_call(jc.lift(fn, on_fallback="error"), small, x)


def by_qwix(params, rule, x):
    """A call of the same model, quantized by Qwix."""
    import qwix

    model = flax_models.MLP(x.shape[-1], LAYERS)
    named = {f"Dense_{i}": layer for i, layer in enumerate(params)}
    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", **rule)])
    quantized = qwix.quantize_model(model, provider)
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    small = qwix.quantize_params(named, abstract)
    return compile_call(lambda params, x: quantized.apply({"params": params}, x), small, x)


def compile_call(fn, params, x):
    """Compiles `fn(params, x)`, as a call without arguments."""
    compiled = jax.jit(fn).lower(params, x).compile()
    return lambda: compiled(params, x)


def measure(width, batch, rounds, calls, with_qwix, seed):
    """All figures of one model and batch, by variant and name."""
    params = models.mlp_init(jax.random.key(seed), [width] * (LAYERS + 1))
    x = jax.random.normal(jax.random.key(seed + 1), (batch, width))
    plain = lambda: compile_call(models.mlp, params, x)
    ours = {name: compressed(params, c, x) for name, (c, _) in VARIANTS.items()}
    ours[TRANSPOSED] = transposed(params, VARIANTS["w8a8"][0], x)
    theirs = {name: by_qwix(params, r, x) for name, (_, r) in VARIANTS.items() if with_qwix}
    runs = {"float32": plain(), "float32 again": plain()} | ours
    runs |= {f"{name}, Qwix": run for name, run in theirs.items()}
    repeated = {name: lambda run=run: [run() for _ in range(calls)] for name, run in runs.items()}
    samples = timing.interleave(repeated, rounds, warmup=3, seed=seed)
    table = {}
    for name in ("float32", "float32 again", *ours):
        milliseconds = [1e3 * t / calls for t in samples[name].wall]
        row = {"ms": timing.median(milliseconds)} | over(samples, name, "float32", "ratio")
        if name in theirs:
            row |= over(samples, f"{name}, Qwix", "float32", "qwix_ratio", "qwix_cpu_ratio")
            row |= over(samples, name, f"{name}, Qwix", "over_qwix")
        table[name] = row
    return table


def calls_of(width, batch):
    """Calls per round: of a short one alone, a busy machine would be what is measured."""
    return max(1, 2**19 // (width * max(batch, 32)))


def over(samples, name, base, label, cpu_label=None):
    """The ratios of a run to another one, by the clock and of processor time."""
    own, other = samples[name], samples[base]
    return {
        label: timing.ratios(own.wall, other.wall),
        cpu_label or f"cpu_{label}": timing.ratios(own.cpu, other.cpu),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--width", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--seed", type=int, default=0, help="of values and of the order of runs")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    timing.keep_memory()
    with_qwix = importlib.util.find_spec("qwix") is not None
    tables = {
        (width, batch): measure(
            width, batch, args.rounds, calls_of(width, batch), with_qwix, args.seed
        )
        for width in args.width
        for batch in args.batch
    }
    if args.json:
        figures = {
            f"{LAYERS}x{width} batch {batch} {name} {suffix}": value
            for (width, batch), table in tables.items()
            for name, row in table.items()
            for suffix, value in row.items()
        }
        return timing.emit(figures | {"rounds": args.rounds, "qwix": with_qwix, "seed": args.seed})
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "170")  # A file has no width, and tables are wide.
    for (width, batch), table in tables.items():
        rows = [(name, *(row.get(s, "-") for s in COLUMNS)) for name, row in table.items()]
        title = f"MLP {LAYERS} x {width}, batch {batch}"
        timing.show(title, ("weights", *COLUMNS.values()), rows)
    if not with_qwix:
        print("Qwix is not installed: pip install qwix")


if __name__ == "__main__":
    main()
