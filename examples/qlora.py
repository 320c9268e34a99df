"""Adapters trained beside a frozen language model in few bits.

SmolLM2-135M's kernels are rounded to 3 bits in groups of 64, and thin factors beside them are
trained on the next tokens of one category of the Brown corpus. Factors start at 0 together (QLoRA),
or at the best approximation of what rounding took (LoftQ). Only they get gradients and optimizer
states; the codes stay as they are. Perplexity is that of text of the same category that was not
trained on, and of another category.

    python -m examples.qlora [--format int3] [--rank 8] [--steps 60]

References:
    Dettmers et al., 2023, QLoRA: Efficient Finetuning of Quantized LLMs.
    Li et al., 2024, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxopt_compress as jc
from examples.fetching import fetch
from examples.models import smollm2
from examples.models.common import stack

KERNELS = "**/kernel"
TRAINED, OTHER = "romance", "government"
LENGTH, HELD_OUT = 128, 8


def starts(base, rank):
    """Name -> compression: a rounded model, and two starts of adapters beside it."""
    return {
        "rounded": base,
        "from zero": jc.chain(base, jc.lora(rank, KERNELS)),
        "from the error": jc.low_rank_correction(base, rank, rounds=3),
    }


def loss(params, ids, following):
    """The mean cross-entropy of next tokens; runs on compressed parameters."""
    logits = jc.lift(smollm2.apply, on_fallback="error")(params, ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()


def adapt(small, batches, steps, rate):
    """Trains the factors of the second part of each sum.

    Returns:
        The model with trained factors, and the bytes of what training holds beside the model.
    """
    adapters, frozen = jc.partition(small, "**/parts/1/*")
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, frozen, state, ids, following):
        of_adapters = lambda adapters: loss(jc.combine(adapters, frozen), ids, following)
        grads = jax.grad(of_adapters)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for i in track(range(steps), "training", transient=True):
        adapters, state = step(adapters, frozen, state, *batches[i % len(batches)])
        jax.block_until_ready(adapters)
    return jc.combine(adapters, frozen), jc.nbytes(adapters) + jc.nbytes(state)


def main(argv=None):
    """Prints perplexities before and after training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int3")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=2, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    folder = fetch("smollm2")
    params, tokenize = stack(smollm2.load(folder)), smollm2.tokenizer(folder)
    count = HELD_OUT + args.steps * args.batch
    windows = lambda category, count: smollm2.windows(tokenize, category, count, LENGTH, args.batch)
    # The first windows are held out, so that they do not depend on the number of steps.
    own, others = windows(TRAINED, count), windows(OTHER, HELD_OUT)
    held_out = HELD_OUT // args.batch
    test, batches = own[:held_out], [tuple(map(jnp.asarray, b)) for b in own[held_out:]]
    score = lambda p, on: jc.evaluate(smollm2.apply, p, on, ["perplexity"])["perplexity"]
    figures = lambda p: {TRAINED: score(p, test), OTHER: score(p, others), "bytes": jc.nbytes(p)}
    rows = {"float32": figures(params)}
    base = jc.quantize(args.format, group_size=args.group, where=KERNELS)
    uses = jc.uses(smollm2.apply, params, batches[0][0])
    for name, c in starts(base, args.rank).items():
        small = jc.compress(params, c, uses=uses)
        rows[name] = figures(small)
        if name != "rounded":
            small, held = adapt(small, batches, args.steps, args.rate)
            rows[f"{name}, trained"] = figures(small) | {"training": held}
    if args.json:
        print(json.dumps(rows))
        return rows
    table = Table(title=f"SmolLM2-135M in {args.format} g{args.group}, adapters of {args.rank}")
    for column in ("", TRAINED, OTHER, "bytes", "bytes beside, in training"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        cells = [f"{row[TRAINED]:.2f}", f"{row[OTHER]:.2f}", f"{row['bytes']:,}"]
        table.add_row(name, *cells, f"{row['training']:,}" if "training" in row else "")
    Console().print(table)
    return rows


if __name__ == "__main__":
    main()
