"""Rounds EfficientNet-Lite0, and asks whether other answers are errors or near ties.

Norms are folded first; biases are then corrected for what rounding does to means. Agreement is how
often the answer, of ImageNet's classes, is that of float32: on pictures of clothes, which the model
has never seen, and on shifted crops of scikit-learn's two photographs. The margin is the distance
between the two largest logits, and the error that of a logit.

    python -m examples.efficientnet --images 200
"""

import argparse

import jax
import numpy as np
from sklearn.datasets import load_sample_images

import jaxopt_compress as jc
from examples import data
from examples.fetching import fetch
from examples.models.efficientnet import SIZE, WEIGHTS, apply, load, resized


def crops(size=224, step=40):
    """Crops of both photographs, bytes (n, size, size, 3)."""
    photos = load_sample_images().images
    corners = [(i, j) for i in range(0, 203, step) for j in range(0, 416, step)]
    return np.stack([p[i : i + size, j : j + size] for p in photos for i, j in corners])


def logits(fn, params, images, size=20):
    """Logits of all images, in parts."""
    run = jax.jit(jc.lift(fn))
    parts = (images[i : i + size] for i in range(0, len(images) - size + 1, size))
    return np.concatenate([np.asarray(run(params, part)) for part in parts])


def compare(name, got, want):
    """Prints how often answers agree, by the margin of float32."""
    top = np.sort(want, -1)
    margin, same = top[:, -1] - top[:, -2], got.argmax(-1) == want.argmax(-1)
    error = np.sqrt(np.mean((got - want) ** 2))
    near = margin < np.median(margin)
    print(
        f"{name:44} agree {same.mean():6.1%} (below the median margin {same[near].mean():6.1%}, "
        f"above {same[~near].mean():6.1%}); margin {np.median(margin):.2f}, error {error:.2f}",
        flush=True,
    )


def main():
    """Prints a line for each variant and kind of picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    count = parser.parse_args().images
    (train, _), (test, _) = data.fashion_mnist()
    sets = {f"clothes at {SIZE}": resized(test[:count]), "photographs at 224": crops()[:count]}
    seen = resized(train[:100])
    params = load(fetch("efficientnet_lite0"))
    folded = jc.fold_norms(apply, params, seen[:20])
    fn, new = folded.function(apply), folded.params
    uses = jc.uses(fn, new, seen[:20])
    measures = (jc.measures.means(), jc.measures.ranges())
    stats = jc.calibrate(fn, new, [seen[i : i + 20] for i in range(0, 100, 20)], measures=measures)
    want = {kind: logits(apply, params, images) for kind, images in sets.items()}
    for bits in ("int8", "int4"):
        plain = jc.compress(
            params, jc.quantize(bits, where=WEIGHTS), uses=jc.uses(apply, params, seen[:20])
        )
        small = jc.compress(new, jc.quantize(bits, where=WEIGHTS), uses=uses)
        corrected = jc.correct_biases(fn, new, small, seen[:20], stats=stats)
        variants = {
            bits: (apply, plain),
            f"{bits} folded": (fn, small),
            f"{bits} folded, biases corrected": (fn, corrected.params),
        }
        for name, (own, tree) in variants.items():
            for kind, images in sets.items():
                compare(f"{name}, {kind}", logits(own, tree, images), want[kind])


if __name__ == "__main__":
    main()
