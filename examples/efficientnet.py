"""Rounds EfficientNet-Lite0, and asks whether changed answers are errors or near ties.

There are no labelled pictures of ImageNet here. Measured are a linear layer for the ten classes of
Fashion-MNIST, fitted to features of float32, and how often the answer of ImageNet's thousand is
that of float32: for clothes, which the model has never seen, and for crops of scikit-learn's two
photographs. Beside roundings stand changes that nobody would call errors: weights in bfloat16, and
pictures with one level of grey of noise. The margin is the distance between the two largest logits;
"by margins" is the agreement that independent errors of the measured size would leave.

    python -m examples.efficientnet --images 200 --variants int8 "int8, one scale per weight"
    python -m examples.efficientnet --results efficientnet.json     # all variants
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_sample_images

import jaxopt_compress as jc
from examples import data
from examples.fetching import fetch
from examples.models.efficientnet import WEIGHTS, apply, batches, load, probe, resized
from examples.results import Results, show
from jaxopt_compress.evaluation.timing import interleave
from jaxopt_compress.tree import map_named

# Logits beyond these are those of the linear layer.
CLASSES, PART = 1000, 20
STATIC = jc.activations("int8", "calibrated")
# By default the largest magnitude is 127.5 steps: it becomes 127 or, negative, mostly -128, and so
# moves down in nearly all channels. Here it is 127 steps, and stays.
ON_GRID = jc.bounds.absmax(on_grid=True)
WEIGHTS_ONLY = {
    "int8": jc.quantize("int8", where=WEIGHTS),
    "int8, largest on the grid": jc.quantize("int8", where=WEIGHTS, bounds=ON_GRID),
    "int8, asymmetric": jc.quantize("int8", where=WEIGHTS, symmetric=False),
    "int8, one scale per weight": jc.quantize("int8", where=WEIGHTS, per="tensor"),
    "int4": jc.quantize("int4", where=WEIGHTS),
    "int4, squared error": jc.quantize("int4", where=WEIGHTS, bounds=jc.bounds.mse()),
    "int4, gptq": jc.gptq("int4", where=WEIGHTS),
}
BOTH = {
    "int8, activations int8": jc.quantize("int8", where=WEIGHTS, activations="int8"),
    "int8, activations int8 calibrated": jc.quantize("int8", where=WEIGHTS, activations=STATIC),
}
TIMED = ("int8", "int4", *BOTH)
CHANGES = ("bfloat16", "noise as large as int8's", "pictures with noise")
CORRECTED = ", biases corrected"
VARIANTS = (
    *CHANGES,
    "int8, norms not folded",
    *WEIGHTS_ONLY,
    f"int8{CORRECTED}",
    f"int4{CORRECTED}",
    *BOTH,
)


def crops(size=224, rows=4, columns=10):
    """Crops of both photographs, bytes (2 * rows * columns, size, size, 3)."""
    photos = load_sample_images().images
    height, width, _ = photos[0].shape
    tops, lefts = np.linspace(0, height - size, rows), np.linspace(0, width - size, columns)
    corners = [(int(i), int(j)) for i in tops for j in lefts]
    return np.stack([p[i : i + size, j : j + size] for p in photos for i, j in corners])


def noisy(images):
    """Each byte one more, one less or as it is."""
    noise = np.random.default_rng(0).integers(-1, 2, images.shape)
    return np.clip(images.astype(np.int32) + noise, 0, 255).astype(np.uint8)


def with_noise(params, small):
    """Weights with normal noise, per channel as large as the error of the compressed ones."""
    rng = np.random.default_rng(0)

    def changed(w, rounded):
        error = np.asarray(rounded - w)
        size = np.sqrt(np.mean(error**2, axis=tuple(range(w.ndim - 1))))
        return w + jnp.asarray(rng.normal(size=w.shape) * size, w.dtype)

    return jc.map_dense(changed, params, small)


def joined(params, fitted):
    """Both last layers side by side, so that one run answers both questions."""
    pairs = {k: [params["head"][k], fitted["head"][k]] for k in ("kernel", "bias")}
    return params | {"head": {k: jnp.concatenate(v, -1) for k, v in pairs.items()}}


def agreement(got, want):
    """How often answers are the same, and what margins and errors say of it."""
    rows, (second, first) = np.arange(len(want)), np.argsort(want, -1)[:, -2:].T
    margin = want[rows, first] - want[rows, second]
    moved = got[rows, first] - got[rows, second] - margin
    error = float(np.sqrt(np.mean(moved**2)))
    answers, wide = got.argmax(-1), margin > np.median(margin)
    same = answers == first
    # The distribution function of normal errors of this size.
    kept = [0.5 * (1 + math.erf(m / max(error, 1e-9) / math.sqrt(2))) for m in margin]
    return {
        "agree": float(same.mean()),
        "above the median": float(same[wide].mean()),
        "by margins": float(np.mean(kept)),
        "or second": float((same | (answers == second)).mean()),
        "margin": float(np.median(margin)),
        "error": error,
    }


class Variants:
    """Each variant as a function, its parameters and what it does to pictures.

    Args:
        params: Of the model, with both last layers.
        seen: Batches of pictures to calibrate on.
    """

    def __init__(self, params, seen):
        self.params, self.seen = params, seen
        self.folded = jc.fold_norms(apply, params, seen[0])
        self.fn = self.folded.function(apply)

    @functools.cached_property
    def uses(self):
        return jc.uses(self.fn, self.folded.params, self.seen[0])

    @functools.cached_property
    def stats(self):
        measures = (jc.measures.means(), jc.measures.ranges(), jc.measures.moments())
        return jc.calibrate(
            self.fn, self.folded.params, self.seen, where=WEIGHTS, measures=measures
        )

    def small(self, compression):
        """The folded parameters, compressed."""
        return jc.compress(self.folded.params, compression, uses=self.uses, stats=self.stats)

    def __call__(self, name):
        """``(function, parameters, of pictures)``."""
        same, new = lambda images: images, self.folded.params
        if name == "float32":
            return self.fn, new, same
        if name == "pictures with noise":
            return apply, self.params, noisy
        if name == "bfloat16":
            half = lambda _, w: w.astype(jnp.bfloat16).astype(jnp.float32)
            return self.fn, map_named(half, new), same
        if name == "noise as large as int8's":
            return self.fn, with_noise(new, self.small(WEIGHTS_ONLY["int8"])), same
        if name == "int8, norms not folded":
            uses = jc.uses(apply, self.params, self.seen[0])
            return apply, jc.compress(self.params, WEIGHTS_ONLY["int8"], uses=uses), same
        if name.endswith(CORRECTED):
            small = self.small(WEIGHTS_ONLY[name.removesuffix(CORRECTED)])
            rw = jc.correct_biases(self.fn, new, small, self.seen[0], stats=self.stats)
            return rw.function(self.fn), rw.params, same
        return self.fn, self.small((WEIGHTS_ONLY | BOTH)[name]), same


def logits(fn, params, images):
    """Logits of all images, in parts."""
    run = compiled(fn)
    parts = [images[i : i + PART] for i in range(0, len(images), PART)]
    return np.concatenate([np.asarray(run(params, part)) for part in parts])


@functools.cache
def compiled(fn):
    """One program for all variants of a function with leaves of the same kinds."""
    return jax.jit(jc.lift(fn))


def times(variants, names, images, rounds=7):
    """Milliseconds of a picture, the median of rounds in which all take turns."""
    made = {name: variants(name) for name in names}
    runs = {n: lambda fn=fn, p=p: compiled(fn)(p, images) for n, (fn, p, _) in made.items()}
    return {
        name: 1e3 * float(np.median(found.wall)) / len(images)
        for name, found in interleave(runs, rounds).items()
    }


def fitted(count=3000):
    """The parameters, with the linear layer for clothes beside the last one."""
    params, (train, _) = load(fetch("efficientnet_lite0")), data.fashion_mnist()
    return joined(params, probe(params, batches(*train, count)))


def main(argv=None):
    """Prints a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="of clothes")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--results", metavar="FILE", help="JSON of variants measured before")
    parser.add_argument("--times", action="store_true", help="only how long a picture takes")
    args = parser.parse_args(argv)
    results = Results(args.results, {"images": args.images})
    (train, _), (test, labels) = data.fashion_mnist()
    seen = [resized(train[i : i + PART]) for i in range(0, 200, PART)]
    variants = Variants(fitted(), seen)
    if args.times:
        for name, each in times(variants, ("float32", *TIMED), crops()[:PART]).items():
            print(f"{name:36} {each:6.2f} ms")
        return {}
    sets = {"clothes": np.asarray(resized(test[: args.images])), "photographs": crops()}
    want = {kind: logits(apply, variants.params, images) for kind, images in sets.items()}
    right = lambda got: float(np.mean(got[:, CLASSES:].argmax(-1) == labels[: args.images]))

    def measure(name):
        fn, tree, change = variants(name)
        # Weights alone say the same when they are dense, and one program serves them all.
        own = tree if name in BOTH else jc.materialize(tree)
        got = {kind: logits(fn, own, change(images)) for kind, images in sets.items()}
        found = {k: agreement(got[k][:, :CLASSES], want[k][:, :CLASSES]) for k in sets}
        return found | {"accuracy": right(got["clothes"]), "bytes": jc.nbytes(tree)}

    say("float32", results.row("float32", lambda: {"accuracy": right(want["clothes"])}))
    for name in args.variants:
        say(name, results.row(name, lambda n=name: measure(n)))
    table(results.rows)
    return results.rows


def table(rows):
    """Prints a line per variant."""
    number = lambda key, form: lambda found: f"{found[key]:{form}}"
    columns = {
        "agree": number("agree", ".1%"),
        "by margins": number("by margins", ".1%"),
        "or second": number("or second", ".1%"),
        "margin": number("margin", ".2f"),
        "its error": number("error", ".2f"),
    }
    kinds = ("clothes", "photographs")
    names = ["accuracy", *(f"{kind}: {name}" for kind in kinds for name in columns)]
    cells = lambda row: [
        c(row[kind]) if kind in row else "" for kind in kinds for c in columns.values()
    ]
    show("", names, {name: [f"{row['accuracy']:.1%}", *cells(row)] for name, row in rows.items()})


def say(name, row):
    """Prints what is known of a variant."""
    parts = [
        f"{kind} {row[kind]['agree']:.1%}" for kind in ("clothes", "photographs") if kind in row
    ]
    print(f"{name:36} accuracy {row['accuracy']:.1%}; agree: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
