"""What gradual magnitude pruning adds to a training step: an MLP of 10M parameters, adam.

python benchmarks/prune_step.py [--rounds 30] [--seed 0] [--json]
"""

import argparse
import itertools

import jax
import models
import optax
import timing

import jaxopt_compress as jc

SIZES = (512, 2048, 2048, 2048, 256)
PERIOD = 10


def make_step(tx, compression):
    """One training step, ``(state, x, labels) -> state``; through the view if there is one."""

    def loss(params, x, labels):
        return models.cross_entropy(models.mlp(params, x), labels)

    return models.train_step(loss, tx, compression)


def build(name, batch, steps, end, seed):
    """The compiled step of a variant, and a run of ``steps`` such steps."""
    schedules = {
        "plain": None,
        "masked": jc.schedules.constant(0.5),
        "every step": jc.schedules.polynomial(0.9, begin=0, end=end),
        f"every {PERIOD} steps": jc.schedules.polynomial(0.9, begin=0, end=end, every=PERIOD),
    }
    schedule = schedules[name]
    c = None if schedule is None else jc.prune(jc.scores.magnitude(), schedule)
    inner = optax.adam(1e-3)
    tx = inner if c is None else jc.compressed_training(inner, c)
    params = models.mlp_init(jax.random.key(seed), SIZES)
    state = (params, jax.jit(tx.init)(params))
    compiled = timing.compiled_step(make_step(tx, c), state, *batch)
    return compiled, timing.training(compiled, state, *batch, steps=steps)


def measure(rounds, end, seed):
    """All figures, by name."""
    keys = jax.random.split(jax.random.key(seed + 1))
    x = jax.random.normal(keys[0], (64, SIZES[0]))
    batch = (x, jax.random.randint(keys[1], (64,), 0, SIZES[-1]))
    names = ("plain", "masked", "every step", f"every {PERIOD} steps")
    # Each round takes a whole period of every variant, so that each pays for its share of updates.
    built = {name: build(name, batch, PERIOD, end, seed) for name in names}
    runs = {name: run for name, (_, run) in built.items()}
    samples = timing.interleave(runs, rounds, warmup=1, seed=seed)

    leaf = max(a * b for a, b in itertools.pairwise(SIZES)) * 4
    temporaries = {k: c.memory_analysis().temp_size_in_bytes for k, (c, _) in built.items()}
    figures = {}
    for name in names:
        key, plain, own = name.replace(" ", "_"), samples["plain"], samples[name]
        figures[f"{key}_ms"] = timing.median([1e3 * t / PERIOD for t in own.wall])
        figures[f"{key}_cpu_ms"] = timing.median([1e3 * t / PERIOD for t in own.cpu])
        figures[f"{key}_ratio"] = timing.ratios(own.wall, plain.wall)
        figures[f"{key}_cpu_ratio"] = timing.ratios(own.cpu, plain.cpu)
        extra = temporaries[name] - temporaries["plain"]
        figures[f"{key}_extra_temporaries_per_largest_leaf"] = round(extra / leaf, 4)
    parameters = sum(p.size for p in jax.tree.leaves(models.mlp_init(jax.random.key(0), SIZES)))
    return figures | {"parameters": parameters, "rounds": rounds, "period": PERIOD, "seed": seed}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="of 10 steps of every variant")
    parser.add_argument("--end", type=int, default=1000, help="last step of the schedule")
    parser.add_argument("--fresh-memory", action="store_true", help="let malloc return memory")
    parser.add_argument("--seed", type=int, default=0, help="of values and of the order of runs")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    if not args.fresh_memory:
        timing.keep_memory()
    figures = measure(args.rounds, args.end, args.seed)
    if args.json:
        return timing.emit(figures)
    columns = ("mask updated", "ms", "ratio", "CPU ms", "CPU ratio", "extra temp. / leaf")
    suffixes = ("ms", "ratio", "cpu_ms", "cpu_ratio", "extra_temporaries_per_largest_leaf")
    variants = {
        "no mask": "plain",
        "never": "masked",
        "every step": "every_step",
        f"every {PERIOD} steps": f"every_{PERIOD}_steps",
    }
    rows = [(label, *(figures[f"{k}_{s}"] for s in suffixes)) for label, k in variants.items()]
    title = f"Gradual magnitude pruning of {figures['parameters'] / 1e6:.1f}M parameters, per step"
    timing.show(title, columns, rows)


if __name__ == "__main__":
    main()
