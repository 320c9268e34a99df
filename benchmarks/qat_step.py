"""What quantization adds to a training step, beside Qwix and AQT where they are installed.

python benchmarks/qat_step.py [--rounds 40] [--models mlp transformer] [--json]

An MLP of 4 x 512 on 128 rows and a transformer of 4 x 512 on 256 tokens, as Flax modules, with
adam. Dense layers are quantized: their weights to int8 ("w8"), activations too ("w8a8"), and
cotangents in the backward pass ("w8a8g8", stochastically). "unrounded" multiplies them with the
factors before rounding, as Qwix and AQT do; otherwise with those of the forward pass, which
"recomputed" does not keep: CPUs, which share what is computed twice, keep them all the same. Time
per step over that of float32, compiled and interleaved in one process; "CPU" is processor time, of
which a busy machine takes less away.
Qwix and AQT are no dependencies (pip install qwix aqtp): without them their rows are missing.
"""

import argparse
import importlib.util
import os
import sys

import flax_models
import jax
import jax.numpy as jnp
import models
import optax
import timing

import jaxopt_compress as jc

LAYERS, WIDTH, VOCABULARY = 4, 512, 1024
OURS = {
    "w8": {},
    "w8 recomputed": {"residuals": "recomputed"},
    "w8 unrounded": {"residuals": "unrounded"},
    "w8a8": {"inputs": "int8"},
    "w8a8 unrounded": {"inputs": "int8", "residuals": "unrounded"},
    "w8a8g8": {"inputs": "int8", "gradients": "int8"},
}
BY_QWIX = {
    "w8": {"weight_qtype": "int8"},
    "w8a8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "w8a8g8": {
        "weight_qtype": "int8",
        "act_qtype": "int8",
        "bwd_qtype": "int8",
        "bwd_stochastic_rounding": "uniform",
    },
}
# AQT always rounds both operands; bits on the way to activations and to weights.
BY_AQT = {"w8a8": (None, None), "w8a8g8": (8, 8)}


def dense_kernel(path, leaf):
    """Whether a parameter is the kernel of a dense layer, of either model."""
    del leaf
    return "dense_" in path.lower() and path.endswith("kernel")


def mlp(dot_general=None):
    """The module, its loss on outputs and targets, and a batch."""
    x, y = (jax.random.normal(key, (128, WIDTH)) for key in jax.random.split(jax.random.key(1)))
    square = lambda out, y: jnp.mean((out - y) ** 2)
    return flax_models.MLP(WIDTH, LAYERS, dot_general), square, (x, y)


def transformer(dot_general=None):
    """Likewise."""
    tokens = jax.random.randint(jax.random.key(1), (2, 129), 0, VOCABULARY)
    module = flax_models.Transformer(WIDTH, LAYERS, VOCABULARY, dot_general)
    return module, models.cross_entropy, (tokens[:, :-1], tokens[:, 1:])


MODELS = {"mlp": mlp, "transformer": transformer}
# Steps per round: a single one of the MLP, of 6 ms, is at the mercy of a busy machine.
STEPS = {"mlp": 8, "transformer": 1}


def step_of(module, measure, compression=None, rngs=None):
    """One training step ``(state, x, y) -> state``, and how its optimizer starts."""

    def loss(params, x, y):
        return measure(module.apply({"params": params}, x, rngs=rngs), y)

    inner = optax.adam(1e-3)
    if compression is None:
        return models.train_step(loss, inner, None), inner
    tx = jc.compressed_training(inner, compression)
    return models.train_step(jc.lift(loss, on_fallback="error"), tx, compression), tx


def steps_of(make):
    """All variants of a model: name -> (step, transformation)."""
    module, measure, _ = make()
    steps = {name: step_of(module, measure) for name in ("float32", "float32 again")}
    for name, options in OURS.items():
        steps[name] = step_of(module, measure, jc.quantize("int8", where=dense_kernel, **options))
    noise = {"stochastic_rounding": jax.random.key(2)}
    if installed("qwix"):
        import qwix

        for name, options in BY_QWIX.items():
            # Attention, which multiplies no weights, stays as it is.
            rule = qwix.QtRule(module_path=".*[Dd]ense_.*", **options)
            quantized = qwix.quantize_model(module, qwix.QtProvider([rule]))
            steps[f"{name}, Qwix"] = step_of(quantized, measure, rngs=noise)
    if installed("aqt"):
        from aqt.jax.v2 import config

        for name, (to_x, to_w) in BY_AQT.items():
            own = config.config_v4(fwd_bits=8, dlhs_bits=to_x, drhs_bits=to_w)
            own = config.set_context(own, jax.random.key(3), train_step=None)
            steps[f"{name}, AQT"] = step_of(make(own)[0], measure)
    return steps


def installed(package):
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def compile_variants(make, steps, seed):
    """Name -> (compiled step, a run of some of them), all from the same parameters."""
    module, _, batch = make()
    built = {}
    for name, (step, tx) in steps_of(make).items():
        params = module.init(jax.random.key(seed), batch[0])["params"]
        state = (params, jax.jit(tx.init)(params))
        compiled = timing.compiled_step(step, state, *batch)
        built[name] = compiled, timing.training(compiled, state, *batch, steps=steps)
    return built


def measure(name, rounds, seed):
    """All figures of a model, by variant and name."""
    built = compile_variants(MODELS[name], STEPS[name], seed)
    runs = {name: run for name, (_, run) in built.items()}
    samples = timing.interleave(runs, rounds, warmup=3, seed=seed)
    table, base = {}, built["float32"][0]
    peers = lambda variant: [k for k in built if k.startswith(f"{variant.split()[0]}, ")]
    for variant, (compiled, _) in built.items():
        own, plain = samples[variant], samples["float32"]
        row = {
            "ms": timing.median([1e3 * t / STEPS[name] for t in own.wall]),
            "ratio": timing.ratios(own.wall, plain.wall),
            "cpu_ratio": timing.ratios(own.cpu, plain.cpu),
        }
        for short, key in (("flops", "flops"), ("bytes", "bytes accessed")):
            amount = compiled.cost_analysis()[key] / base.cost_analysis()[key]
            row[f"{short}_ratio"] = round(amount, 3)
        row["temporaries_mb"] = round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
        if peers(variant):
            # The faster one of the others, by its median.
            best = min(peers(variant), key=lambda k: timing.median(samples[k].wall).median)
            row["over_best"] = timing.ratios(own.wall, samples[best].wall)
            row["cpu_over_best"] = timing.ratios(own.cpu, samples[best].cpu)
        table[variant] = row
    return table


COLUMNS = {
    "ms": "ms",
    "ratio": "over float32",
    "cpu_ratio": "CPU",
    "flops_ratio": "FLOPs",
    "bytes_ratio": "bytes",
    "temporaries_mb": "temp. MB",
    "over_best": "over the faster peer",
    "cpu_over_best": "CPU",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--fresh-memory", action="store_true", help="let malloc return memory")
    parser.add_argument(
        "--seed", type=int, default=0, help="of parameters and of the order of runs"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    if not args.fresh_memory:
        timing.keep_memory()
    tables = {name: measure(name, args.rounds, args.seed) for name in args.models}
    if args.json:
        figures = {
            f"{model} {name} {suffix}": value
            for model, table in tables.items()
            for name, row in table.items()
            for suffix, value in row.items()
        }
        return timing.emit(figures | {"rounds": args.rounds, "seed": args.seed})
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "150")  # A file has no width, and tables are wide.
    for model, table in tables.items():
        rows = [(name, *(row.get(s, "-") for s in COLUMNS)) for name, row in table.items()]
        timing.show(f"Training step: {model}", ("variant", *COLUMNS.values()), rows)
    for package, name in (("qwix", "qwix"), ("aqt", "aqtp")):
        if not installed(package):
            print(f"{name} is not installed")


if __name__ == "__main__":
    main()
