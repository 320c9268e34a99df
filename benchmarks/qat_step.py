"""What int8 weights, straight-through, add to a training step: a transformer 4 x 512, adam.

python benchmarks/qat_step.py [--rounds 40] [--json]
"""

import argparse

import jax
import models
import optax
import timing

import jaxopt_compress as jc

LAYERS, WIDTH, VOCABULARY, BATCH, TIME = 4, 512, 1024, 2, 128


def make_step(tx, compression):
    """One training step, ``(state, tokens) -> state``; through the view if there is one."""

    def loss(params, tokens):
        logits = models.transformer(params, tokens[:, :-1])
        return models.cross_entropy(logits, tokens[:, 1:])

    return models.train_step(loss, tx, compression)


def build(compression, tokens):
    """The compiled step, and a run of one such step."""
    inner = optax.adam(1e-3)
    tx = inner if compression is None else jc.compressed_training(inner, compression)
    params = models.transformer_init(jax.random.key(0), LAYERS, WIDTH, VOCABULARY)
    state = (params, jax.jit(tx.init)(params))
    compiled = timing.compiled_step(make_step(tx, compression), state, tokens)
    return compiled, timing.training(compiled, state, tokens)


def measure(rounds):
    """All figures, by name."""
    tokens = jax.random.randint(jax.random.key(1), (BATCH, TIME + 1), 0, VOCABULARY)
    variants = {"float32": None, "float32_again": None, "int8": jc.quantize("int8")}
    built = {name: build(c, tokens) for name, c in variants.items()}
    samples = timing.interleave({k: run for k, (_, run) in built.items()}, rounds, warmup=3)
    figures = {}
    base = built["float32"][0]
    for name, (compiled, _) in built.items():
        own, plain = samples[name], samples["float32"]
        figures[f"{name}_ms"] = timing.median([1e3 * t for t in own.wall])
        figures[f"{name}_cpu_ms"] = timing.median([1e3 * t for t in own.cpu])
        figures[f"{name}_ratio"] = timing.ratios(own.wall, plain.wall)
        figures[f"{name}_cpu_ratio"] = timing.ratios(own.cpu, plain.cpu)
        for short, key in (("flops", "flops"), ("bytes", "bytes accessed")):
            amount = compiled.cost_analysis()[key] / base.cost_analysis()[key]
            figures[f"{name}_{short}_ratio"] = round(amount, 4)
        memory = compiled.memory_analysis().temp_size_in_bytes
        figures[f"{name}_temporaries_mb"] = round(memory / 1e6, 2)
    return figures | {"tokens": BATCH * TIME, "rounds": rounds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--fresh-memory", action="store_true", help="let malloc return memory")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    if not args.fresh_memory:
        timing.keep_memory()
    figures = measure(args.rounds)
    if args.json:
        return timing.emit(figures)
    columns = ("weights", "ms", "ratio", "CPU ms", "CPU ratio", "FLOPs", "bytes", "temp. MB")
    suffixes = ("ms", "ratio", "cpu_ms", "cpu_ratio", "flops_ratio", "bytes_ratio")
    rows = [
        (label, *(figures[f"{k}_{s}"] for s in (*suffixes, "temporaries_mb")))
        for label, k in (("float32", "float32"), ("again", "float32_again"), ("int8", "int8"))
    ]
    title = f"Training step of a transformer, {LAYERS} layers of {WIDTH}, {BATCH * TIME} tokens"
    timing.show(title, columns, rows)


if __name__ == "__main__":
    main()
