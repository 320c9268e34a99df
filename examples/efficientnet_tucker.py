"""Factorizes EfficientNet-Lite0: smaller convolutions, their agreement with the whole, and time.

Nearly all weights are pointwise convolutions. `tucker` makes three products of each of these, where
`low_rank` needs two; only of the stem, with a window and all channels, it makes something that
matrices do not. Depthwise kernels stay, and all are rounded to int8 behind. Agreement is how often
the answer, of ImageNet's classes, is that of float32, on pictures of clothes and on crops of one of
scikit-learn's two photographs, the other being calibrated on; time is of a batch, all variants in
turn. Nothing is trained, but with ``--steps``: then factors, and all else that is float, learn from
the answers of float32 on further pictures of both kinds, without labels.

    python -m examples.efficientnet_tucker --images 100
    python -m examples.efficientnet_tucker --images 60 --steps 100 --variants "0.8 tucker"
"""

import argparse
import json

import jax
import numpy as np

import jaxopt_compress as jc
from examples import data
from examples.efficientnet import crops
from examples.fetching import fetch
from examples.models.efficientnet import WEIGHTS, apply, load, resized
from jaxopt_compress.evaluation.timing import interleave

POINTWISE = ["blocks/*/expand/kernel", "blocks/*/project/kernel", "top/kernel"]
STEM = "stem/kernel"


def variants(shares):
    """Name -> compression."""
    int8 = jc.quantize("int8", where=WEIGHTS)
    found = {"int8": int8}
    for share in shares:
        tucker = {"ratio": 1 / share, "where": [*POINTWISE, STEM]}
        rank = {"budget": jc.bytes(share), "where": POINTWISE}
        found |= {
            f"{share:g} tucker": jc.tucker(**tucker),
            f"{share:g} tucker, int8": jc.chain(jc.tucker(**tucker), int8),
            f"{share:g} rank": jc.low_rank(**rank),
            f"{share:g} rank, whitened": jc.low_rank(**rank, whiten=True),
            f"{share:g} rank, whitened, int8": jc.chain(jc.low_rank(**rank, whiten=True), int8),
        }
    return found


def distilled(params, small, pictures, steps):
    """Answers in the place of those of ``params``; every float of the tree learns."""
    soft = lambda got, want: jc.distillation.soft_targets(got, want, 1.0).mean()
    given = {"loss": soft, "steps": steps, "rate": 3e-3, "progress": True}
    return jc.distill(apply, params, small, pictures, "**", **given)


def main(argv=None):
    """Prints a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.8])
    parser.add_argument("--variants", nargs="*", help="names; all by default")
    parser.add_argument("--steps", type=int, default=0, help="of distillation")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args(argv)
    (train, _), (test, _) = data.fashion_mnist()
    first, second = np.split(crops(rows=6), 2)
    sets = {"clothes": resized(test[: args.images]), "photographs": first[: args.images]}
    seen = [*np.split(np.asarray(resized(train[:100])), 5), *np.split(second, 3)]
    # As many of clothes as of the photograph, in turn.
    clothes = np.split(np.asarray(resized(train[100:460])), 18)
    pictures = [x for pair in zip(clothes, 6 * seen[5:], strict=True) for x in pair]
    params = load(fetch("efficientnet_lite0"))
    uses = jc.uses(apply, params, seen[0])
    stats = jc.calibrate(apply, params, seen, where=POINTWISE)
    run = jax.jit(jc.lift(apply))

    def answers(own, images, size=20):
        parts = (images[i : i + size] for i in range(0, len(images) - size + 1, size))
        return np.concatenate([np.asarray(run(own, part)).argmax(-1) for part in parts])

    want = {kind: answers(params, images) for kind, images in sets.items()}
    batch, small, found = second[:4], {"float32": params}, {}
    for name, compression in variants(args.shares).items():
        if args.variants and name not in args.variants:
            continue
        small[name] = own = jc.compress(params, compression, uses=uses, stats=stats)
        if args.steps:
            small[f"{name}, distilled"] = distilled(params, own, pictures, args.steps)
    call = lambda p: lambda: jax.block_until_ready(run(p, batch))
    times = interleave({name: call(p) for name, p in small.items()}, args.rounds)
    whole = np.median(times["float32"].wall)
    for name, own in small.items():
        dense = jc.materialize(own)
        same = {k: float(np.mean(answers(dense, x) == want[k])) for k, x in sets.items()}
        row = same | {"bytes": jc.nbytes(own), "time": float(np.median(times[name].wall) / whole)}
        found[name] = row
        if not args.json:
            agree = "  ".join(f"{kind} {x:6.1%}" for kind, x in same.items())
            print(f"{name:26} {row['bytes']:11,} bytes  {agree}  {row['time']:5.2f} of the time")
    if args.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
