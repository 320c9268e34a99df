"""Bits where they matter: a mixed recipe beside uniform ones of the same bytes, on MiniLM.

Each weight of MiniLM may have 2, 3, 4 or 8 bits in groups of 64. What each choice costs is found on
sentences of the STS Benchmark's training part: how far vectors move from those of the float32
model, which needs no labels. Then budgets of the bytes that uniform 3 and 4 bits take are given to
the solver, and all are compared by the rank correlation on the test part.

    python -m examples.allocation [--sentences 256] [--measured 2] [--json]
    python -m examples.allocation --loss pairs --beside int3 --bits 3

With ``--loss pairs`` it is how far the similarities of sentence pairs are from a linear function of
those before, since a rank correlation sees no shift and no scale; with ``--beside`` all other
weights are rounded while one is measured. Each recipe also shows how far it moves vectors and the
similarities of all pairs in a batch, as mean squares on the held-out sentences.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples import data
from examples.fetching import fetch
from examples.models import minilm

CANDIDATES = {f"int{bits}": jc.quantize(f"int{bits}", group_size=64) for bits in (2, 3, 4, 8)}
SIZE, LENGTH = 32, 48


def moved(apply, params):
    """A loss: the mean squared distance of vectors from those of ``params``, and its batches."""

    def loss(changed, ids, reference):
        return jnp.mean(jnp.sum(jnp.square(apply(changed, ids) - reference), -1))

    run = jax.jit(apply)
    return loss, lambda ids: (ids, run(params, ids))


def related(apply, params):
    """A loss: 1 less the correlation of pair similarities with those of ``params``.

    The pairs are all those of a sentence in the first half of a batch with one in the second.
    """

    def similarities(params, ids):
        vectors = apply(params, ids)
        first, second = jnp.split(vectors, 2)
        centred = (first @ second.T).ravel()
        return centred - centred.mean()

    def loss(changed, ids, reference):
        own = similarities(changed, ids)
        return 1 - own @ reference / (jnp.linalg.norm(own) * jnp.linalg.norm(reference))

    run = jax.jit(similarities)
    return loss, lambda ids: (ids, run(params, ids))


def changes(ids, params, small):
    """The mean squares of how far vectors move, and the similarities of all pairs in a batch."""

    @jax.jit
    def both(ids, params, small):
        before, after = minilm.apply(params, ids), jc.lift(minilm.apply)(small, ids)
        return jnp.array(
            [
                jnp.mean(jnp.sum(jnp.square(after - before), -1)),
                jnp.mean(jnp.square(after @ after.T - before @ before.T)),
            ]
        )

    found = np.mean([both(each, params, small) for each in ids], 0)
    return {"vectors": float(found[0]), "similarities": float(found[1])}


LOSSES = {"moved": moved, "pairs": related}


def sentences(tokenize, count):
    """Token ids of sentences of the training part, (count / size, size, length)."""
    texts = sorted({text for pair in data.stsb("train") for text in pair[:2]})
    chosen = np.random.default_rng(0).choice(texts, count, replace=False)
    ids = np.zeros((count, LENGTH), np.int32)
    for row, tokens in enumerate(tokenize(list(chosen))):
        ids[row, : len(tokens)] = tokens[:LENGTH]
    return ids.reshape(-1, SIZE, LENGTH)


def main(argv=None):
    """Compares recipes of the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--measured", type=int, default=2, help="candidates of each weight")
    parser.add_argument("--loss", choices=list(LOSSES), default="moved")
    parser.add_argument("--beside", choices=list(CANDIDATES), help="of all other weights")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4], help="budgets")
    parser.add_argument("--resume", help="a file that keeps measurements")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    folder = fetch("minilm")
    tokenize, params = minilm.tokenizer(folder), minilm.load(folder)
    ids = sentences(tokenize, args.sentences)
    loss, made = LOSSES[args.loss](minilm.apply, params)
    batches = list(map(made, ids))
    half = len(batches) // 2
    uses = jc.uses(minilm.apply, params, ids[0])
    table = jc.sensitivities(
        loss,
        params,
        CANDIDATES,
        batches[:half],
        held_out=batches[half:],
        beside=CANDIDATES.get(args.beside),
        uses=uses,
        measured=args.measured,
        resume=args.resume,
        progress=True,
    )
    test = minilm.pairs(tokenize)
    found = {}

    def show(name, recipe):
        small = jc.compress(params, recipe, uses=uses)
        quality = jc.evaluate(minilm.similarity, small, test, ["spearman"])["spearman"]
        found[name] = {"bytes": jc.nbytes(small), "spearman": quality}
        found[name] |= changes(ids[half:], params, small)
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)

    for bits in args.bits:
        uniform = {"**": CANDIDATES[f"int{bits}"]}
        show(f"int{bits}", uniform)
        share = found[f"int{bits}"]["bytes"] / table.dense_bytes
        recipe = jc.allocate(table, jc.bytes(share))
        show(f"allocated, bytes of int{bits}", recipe)
        counts = {name: list(recipe.choices.values()).count(name) for name in CANDIDATES}
        found[f"allocated, bytes of int{bits}"]["weights"] = counts
    if args.json:
        print(json.dumps(found))
        return found
    shown = Table(
        title="MiniLM: rank correlation on the STS Benchmark's test part (float32: .8203)"
    )
    moves = ("vectors move by", "similarities move by")
    for column in ("recipe", "bytes", "Spearman", *moves, "weights of 2, 3, 4, 8 bits"):
        shown.add_column(column, justify="left" if column == "recipe" else "right")
    for name, row in found.items():
        counts = " ".join(map(str, row.get("weights", {}).values()))
        moved_by = f"{row['vectors']:.3f}", f"{row['similarities']:.5f}"
        shown.add_row(name, f"{row['bytes']:,}", f"{row['spearman']:.4f}", *moved_by, counts)
    Console().print(shown)
    return found


if __name__ == "__main__":
    main()
