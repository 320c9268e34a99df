"""What pruning adds to a training step: an MLP of 10M parameters, adam.

Gradual magnitude pruning renews masks at each step, or at each tenth. With --more, at each tenth
too: RigL, 2:4, one threshold for all parameters, blocks of 16 by 16, and the same masks as gradual
pruning by argsort of each parameter.

python benchmarks/prune_step.py [--rounds 30] [--seed 0] [--json]
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import models
import optax
import timing

import jaxopt_compress as jc
from jaxopt_compress.compression import Decision, LeafMethod, compression_of
from jaxopt_compress.sparsity.state import PrunedState

SIZES = (512, 2048, 2048, 2048, 256)
PERIOD = 10
FIRST = ("plain", "masked", "every step", f"every {PERIOD} steps")
MORE = ("sorted", "global", "blocks", "2:4", "rigl")


def make_step(tx, compression):
    """One training step, ``(state, x, labels) -> state``; through the view if there is one."""

    def loss(params, x, labels):
        return models.cross_entropy(models.mlp(params, x), labels)

    return models.train_step(loss, tx, compression)


def sorted_masks(schedule):
    """Gradual magnitude pruning that ranks entries by sorting, as a wrapper like ours."""

    def decide(parameter, count):
        flat = jnp.abs(parameter.dense()).reshape(-1)
        keep = flat.size - jnp.floor(flat.size * schedule.sparsity(count) + 0.5).astype(jnp.int32)
        ranks = jnp.argsort(jnp.argsort(-flat))
        return (ranks < keep).reshape(parameter.value.shape)

    def state(mask):
        return PrunedState(mask, None, None, None, None, None, 0)

    def init(parameter):
        return Decision(state(decide(parameter, jnp.int32(0))))

    def update(decision, count, parameter):
        mask = decision.state.mask
        due = lambda: decide(parameter, count)
        return Decision(state(jax.lax.cond(schedule.due(count), due, lambda: mask)))

    return compression_of(LeafMethod(lambda parameter: None, init, update), None)


def compression_named(name, end):
    """The compression of a variant; None for none."""
    score, often = jc.scores.magnitude(), {"begin": 0, "end": end, "every": PERIOD}
    rising = jc.schedules.polynomial(0.9, **often)
    return {
        "plain": lambda: None,
        "masked": lambda: jc.prune(score, jc.schedules.constant(0.5)),
        "every step": lambda: jc.prune(score, jc.schedules.polynomial(0.9, begin=0, end=end)),
        f"every {PERIOD} steps": lambda: jc.prune(score, rising),
        "sorted": lambda: sorted_masks(rising),
        "global": lambda: jc.prune(score, rising, scope="global"),
        "blocks": lambda: jc.prune(score, rising, "block:16x16"),
        "2:4": lambda: jc.prune(score, jc.schedules.constant(0.5, every=PERIOD), "2:4"),
        "rigl": lambda: jc.prune(
            score,
            jc.schedules.constant(0.9, every=PERIOD),
            grow=jc.grow.by_gradient(0.3, start=jc.scores.random(jax.random.key(0))),
        ),
    }[name]()


def build(name, batch, steps, end, seed):
    """The compiled step of a variant, and a run of ``steps`` such steps."""
    c = compression_named(name, end)
    inner = optax.adam(1e-3)
    tx = inner if c is None else jc.compressed_training(inner, c)
    params = models.mlp_init(jax.random.key(seed), SIZES)
    state = (params, jax.jit(tx.init)(params))
    compiled = timing.compiled_step(make_step(tx, c), state, *batch)
    return compiled, timing.training(compiled, state, *batch, steps=steps)


def key_of(name):
    """What figures of a variant begin with."""
    return name.replace(" ", "_").replace(":", "_")


def measure(rounds, end, seed, more=False):
    """All figures, by name."""
    keys = jax.random.split(jax.random.key(seed + 1))
    x = jax.random.normal(keys[0], (64, SIZES[0]))
    batch = (x, jax.random.randint(keys[1], (64,), 0, SIZES[-1]))
    names = (*FIRST, *MORE) if more else FIRST
    # Each round takes a whole period of every variant, so that each pays for its share of updates.
    built = {name: build(name, batch, PERIOD, end, seed) for name in names}
    runs = {name: run for name, (_, run) in built.items()}
    samples = timing.interleave(runs, rounds, warmup=1, seed=seed)

    leaf = max(a * b for a, b in itertools.pairwise(SIZES)) * 4
    temporaries = {k: c.memory_analysis().temp_size_in_bytes for k, (c, _) in built.items()}
    figures = {}
    for name in names:
        key, plain, own = key_of(name), samples["plain"], samples[name]
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
    parser.add_argument("--more", action="store_true", help="other patterns, scopes and growth")
    parser.add_argument("--fresh-memory", action="store_true", help="let malloc return memory")
    parser.add_argument("--seed", type=int, default=0, help="of values and of the order of runs")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    if not args.fresh_memory:
        timing.keep_memory()
    figures = measure(args.rounds, args.end, args.seed, args.more)
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
    if args.more:
        variants |= {f"every {PERIOD} steps, {name}": key_of(name) for name in MORE}
    rows = [(label, *(figures[f"{k}_{s}"] for s in suffixes)) for label, k in variants.items()]
    title = f"Gradual magnitude pruning of {figures['parameters'] / 1e6:.1f}M parameters, per step"
    timing.show(title, columns, rows)


if __name__ == "__main__":
    main()
