"""What lifting adds to tracing: a Flax linen transformer of 24 blocks, over tracing it plain.

    python benchmarks/trace_time.py [--rounds 25] [--seed 0] [--json]

Every round traces functions that jit has not seen, so nothing is in its cache.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import timing

import jaxopt_compress as jc

BLOCKS, WIDTH, HEADS, VOCABULARY = 24, 64, 4, 256
ALL = ("**/kernel", "**/embedding")
ONE = "params/Block_3/Dense_0/kernel"


class Block(nn.Module):
    """A pre-norm transformer block."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(h, h)
        h = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(h))


class Transformer(nn.Module):
    """Token ids to logits, through one embedding for both ends."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(tokens)
        for _ in range(BLOCKS):
            x = Block()(x)
        return embed.attend(nn.LayerNorm()(x))


def tracing(fn, *args):
    """A run that traces `fn` anew."""
    return lambda: jax.jit(lambda *args: fn(*args)).trace(*args) and None


def measure(rounds, seed):
    """All figures, by name."""
    model, tokens = Transformer(), jnp.zeros((2, 16), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    uses = jc.uses(model.apply, params, tokens)
    quantized = lambda where: jc.compress(params, jc.quantize("int8", where=where), uses=uses)
    compressed = {"all": quantized(ALL), "one": quantized(ONE), "none": params}

    lifted = jc.lift(model.apply, on_fallback="error")
    plain = jax.make_jaxpr(model.apply)(params, tokens)
    figures = {"plain_equations": count_equations(plain.jaxpr)}
    for name, tree in compressed.items():
        jaxpr = jax.make_jaxpr(lifted)(tree, tokens)
        figures[f"{name}_equations"] = count_equations(jaxpr.jaxpr)
    figures["none_is_equal"] = str(jaxpr) == str(plain)

    runs = {"plain": tracing(model.apply, params, tokens)}
    runs |= {name: tracing(lifted, tree, tokens) for name, tree in compressed.items()}
    samples = timing.interleave(runs, rounds, warmup=3, seed=seed)
    base = samples["plain"]
    for name, own in samples.items():
        figures[f"{name}_ms"] = timing.median([1e3 * t for t in own.wall])
        figures[f"{name}_cpu_ms"] = timing.median([1e3 * t for t in own.cpu])
        figures[f"{name}_ratio"] = timing.ratios(own.wall, base.wall)
        figures[f"{name}_cpu_ratio"] = timing.ratios(own.cpu, base.cpu)
    return figures | {"blocks": BLOCKS, "rounds": rounds, "seed": seed}


def count_equations(jaxpr):
    """Equations, those of inner jaxprs included."""
    inner = [
        count_equations(getattr(value, "jaxpr", value))
        for eqn in jaxpr.eqns
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        if _is_jaxpr(value)
    ]
    return len(jaxpr.eqns) + sum(inner)


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the order of runs")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    figures = measure(args.rounds, args.seed)
    if args.json:
        return timing.emit(figures)
    columns = ("compressed kernels", "equations", "ms", "ratio", "CPU ms", "CPU ratio")
    suffixes = ("equations", "ms", "ratio", "cpu_ms", "cpu_ratio")
    labels = {"plain": "not lifted", "none": "none", "one": "one", "all": "all"}
    rows = [(label, *(figures[f"{k}_{s}"] for s in suffixes)) for k, label in labels.items()]
    timing.show(f"Tracing a linen transformer of {BLOCKS} blocks", columns, rows)
    print(f"without compressed kernels the jaxpr is equal: {figures['none_is_equal']}")


if __name__ == "__main__":
    main()
