"""Thin factors of trained kernels: what keeps quality at the same bytes.

The kernels of a model become products of two factors that take a share of their bytes: by a plain
SVD, with inputs scaled by their magnitudes, so that outputs rather than entries are kept, with
ranks that go where they lose the least, and with factors of int8. MiniLM is measured by the rank
correlation on the test part of the STS Benchmark, SmolLM2 by the perplexity on the fiction of the
Brown corpus. Nothing is trained. Of MiniLM also the table of words is factorized, as a matrix and
as tensor trains, and factors are put beside codes in either order.

    python -m examples.low_rank                                      # MiniLM, minutes
    python -m examples.low_rank --study table --shares 0.5 0.25 0.125
    python -m examples.low_rank --study residual
    python -m examples.low_rank --model smollm2 --shares 0.8 --tokens 2048
"""

import argparse
import json
import time

import jax

import jaxopt_compress as jc
from examples import minilm as sentences
from examples import smollm2 as language
from examples.allocation_cases import CASES
from examples.fetching import fetch
from examples.models import minilm, smollm2
from jaxopt_compress.tree import named_leaves

KERNELS, TABLE = "**/kernel", "embeddings/word/embedding"
SENSITIVE = "whitened, by sensitivities"


def variants(share):
    """Name -> compression, each to at most ``share`` of the bytes of all kernels."""
    ratio = {"where": KERNELS, "ratio": 1 / share}
    budget = lambda share: {"where": KERNELS, "budget": jc.bytes(min(1.0, share))}
    # Codes take a quarter of the bytes; scales of channels take the rest.
    int8 = jc.quantize("int8", where=KERNELS)
    return {
        "plain": jc.low_rank(**ratio),
        "scaled": jc.low_rank(**ratio, whiten="scale"),
        "whitened": jc.low_rank(**ratio, whiten=True),
        "plain, allocated": jc.low_rank(**budget(share)),
        "whitened, allocated": jc.low_rank(**budget(share), whiten=True),
        "whitened, allocated, int8": jc.chain(
            jc.low_rank(**budget(3.9 * share), whiten=True), int8
        ),
    }


def by_sensitivities(args, share, uses, stats):
    """Ranks where the loss says: from estimates beside the uniform ones, and some measurements."""
    case = CASES[args.model](args.count)
    of = lambda share: jc.low_rank(where=KERNELS, ratio=1 / share, whiten=True)
    shares = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    table = jc.sensitivities(
        case.loss,
        case.params,
        {str(own): of(own) for own in shares},
        case.batches,
        held_out=case.held_out,
        beside=of(share),
        uses=uses,
        stats=stats,
        measured=args.measured,
        progress=True,
    )
    kernels = sum(x.nbytes for path, x in named_leaves(case.params) if path.endswith("kernel"))
    return jc.allocate(table, jc.bytes(1 - (1 - share) * kernels / table.dense_bytes))


def tables(share):
    """Ways to store MiniLM's word vectors in at most ``share`` of their bytes."""
    ratio = {"where": TABLE, "ratio": 1 / share}
    # Codes take a quarter of the bytes, with some room for scales.
    coded = {"where": TABLE, "ratio": 0.26 / share}
    int8 = jc.quantize("int8", where=TABLE)
    found = {
        "rank": jc.low_rank(**ratio),
        "train of 2": jc.kronecker(**ratio),
        "train of 3": jc.tensor_train(**ratio),
    }
    if share < 0.2:
        found |= {
            "rank, int8": jc.chain(jc.low_rank(**coded), int8),
            "train of 2, int8": jc.chain(jc.kronecker(**coded), int8),
        }
    return found


def residuals(bits):
    """Codes and thin factors in every order, the first two without the factors' bytes."""
    codes = lambda bits, size: jc.quantize(bits, group_size=size, where=KERNELS)
    both = lambda **given: jc.low_rank_correction(codes(bits, 64), 8, whiten=True, **given)
    return {
        "codes alone": codes(bits, 64),
        "groups of 16": codes(bits, 16),
        "codes, then factors": both(),
        "the same, 4 rounds": both(rounds=4),
        "factors, then codes": both(factors_first=True),
        "that, 4 rounds": both(factors_first=True, rounds=4),
        "factors and single entries": jc.low_rank_plus_sparse(8, 0.98, KERNELS),
    }


def loaded(args):
    """``(apply, parameters, batches to calibrate on, score)``."""
    folder = fetch(args.model)
    if args.model == "minilm":
        tokenize, params = minilm.tokenizer(folder), minilm.load(folder)
        seen = sentences.calibration(tokenize, args.batches)
        test = minilm.pairs(tokenize)
        fn, metric = minilm.similarity, "spearman"
        apply = minilm.apply
    else:
        tokenize, params = smollm2.tokenizer(folder), smollm2.load(folder)
        own = args.batches * language.LENGTH // len(language.CALIBRATED)
        seen = [(ids,) for ids, _ in language.texts(tokenize, language.CALIBRATED, own)]
        test = language.texts(tokenize, ["fiction"], args.tokens)
        fn, metric = smollm2.apply, "perplexity"
        apply = smollm2.apply
    return apply, params, seen, lambda p: jc.evaluate(fn, p, test, [metric])[metric]


def main(argv=None):
    """Prints a line per variant, or all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("minilm", "smollm2"), default="minilm")
    parser.add_argument("--study", choices=("kernels", "table", "residual"), default="kernels")
    parser.add_argument("--shares", nargs="*", type=float, default=[0.9, 0.8, 0.6, 0.2])
    parser.add_argument("--variants", nargs="*", help="names; all by default")
    parser.add_argument("--batches", type=int, default=16, help="to calibrate on")
    parser.add_argument("--count", type=int, default=64, help="sentences or windows of losses")
    parser.add_argument("--measured", type=int, default=0, help="candidates of each kernel")
    parser.add_argument("--tokens", type=int, default=2048, help="to measure SmolLM2 on")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args(argv)
    if args.study == "residual":
        args.shares = ["int3", "int2"]
    made = {"kernels": variants, "table": tables, "residual": residuals}[args.study]
    where = TABLE if args.study == "table" else KERNELS
    apply, params, seen, score = loaded(args)
    uses = jc.uses(apply, params, *seen[0])
    stats = jc.calibrate(apply, params, seen, where=KERNELS)
    own = where.removeprefix("**/")
    chosen = lambda p: sum(leaf.nbytes for path, leaf in named_leaves(p) if path.endswith(own))
    whole = chosen(params)
    found = {"float32": {"score": score(params), "share": 1.0, "seconds": 0.0}}
    _say("float32", found["float32"], args.json)
    for share in args.shares:
        offered = made(share)
        if args.study == "kernels":
            offered[SENSITIVE] = lambda s=share: by_sensitivities(args, s, uses, stats)
        for name, compression in offered.items():
            if args.variants and name not in args.variants:
                continue
            start = time.perf_counter()
            if name == SENSITIVE:
                compression = compression()
            small = jc.compress(params, compression, uses=uses, stats=stats)
            jax.block_until_ready(jax.tree.leaves(small))
            row = {"share": chosen(small) / whole, "seconds": time.perf_counter() - start}
            # Dense weights are the same numbers, and one program serves them all.
            row["score"] = score(jc.materialize(small))
            found[f"{share} {name}"] = row
            _say(f"{share} {name}", row, args.json)
    if args.json:
        print(json.dumps(found))
    return found


def _say(name, row, quiet):
    if not quiet:
        text = f"{name:32} {row['score']:9.4f}  {row['share']:6.1%} of their bytes"
        print(f"{text}  {row['seconds']:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
