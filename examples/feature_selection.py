"""Fewer input features: projected or chosen, and folded into the first layer of a network.

Principal components and linear discriminants are matrices, which the first kernel absorbs: the
network that was trained on ``k`` of them reads pixels again, by ``W' = P W`` of rank ``k``, stored
as its two factors. Lasso and recursive elimination choose pixels, and the rows of the others leave
the kernel: the network reads ``k`` pixels. Each is fitted on the training part alone, and a network
with one hidden layer is trained on what it gives.

    python -m examples.feature_selection                          # digits
    python -m examples.feature_selection --data fashion --plot out.png
"""

import argparse
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import RFE
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import jaxopt_compress as jc
from examples import data
from examples.models.common import dense
from examples.models.training import cross_entropy, scaled, train
from jaxopt_compress.extras import require

HIDDEN = 64


def apply(params, x):
    """Logits of features, (n, features)."""
    return dense(params["out"], jax.nn.relu(dense(params["in"], x)))


def init(key, features, classes=10):
    """Parameters of a network with one hidden layer."""
    first, second = jax.random.split(key)
    return {
        "in": {"kernel": scaled(first, features, HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "out": {"kernel": scaled(second, HIDDEN, classes), "bias": jnp.zeros(classes)},
    }


def load(name):
    """Pixels of the training part with mean 0 and of one scale, likewise of the test part."""
    if name == "digits":
        x, y = load_digits(return_X_y=True)
        parts = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
        x, test, y, answers = (np.asarray(part) for part in parts)
    else:
        (x, y), (test, answers) = data.fashion_mnist()
        # Every second pixel of both axes.
        shrunk = lambda images, n: images[:n, ::2, ::2].reshape(n, -1)
        x, test, y, answers = shrunk(x, 4000), shrunk(test, 2000), y[:4000], answers[:2000]
    mean, size = x.mean(0), x.std()
    small = lambda x: np.float32((x - mean) / size)
    return small(x), np.int32(y), small(test), np.int32(answers)


def projection(name, x, y, count):
    """A matrix (features, count) whose columns have a variance of 1 on the data."""
    if name == "pca":
        p = PCA(count, random_state=0).fit(x).components_.T
    else:
        p = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(x, y)
        p = p.scalings_[:, :count]
    return np.float32(p / np.maximum((x @ p).std(0), 1e-6))


def chosen(name, x, y, count):
    """The numbers of ``count`` pixels."""
    if name == "variance":
        return np.argsort(-x.var(0))[:count]
    model = LogisticRegression(max_iter=60, C=0.1)
    if name == "elimination":
        return np.flatnonzero(RFE(model, n_features_to_select=count, step=0.2).fit(x, y).support_)
    # The weakest penalty that leaves as many pixels, by bisection; the largest weights of them.
    low, high, best = 1e-5, 1.0, np.zeros(x.shape[1])
    for _ in range(8):
        c = np.sqrt(low * high)
        lasso = LogisticRegression(l1_ratio=1.0, solver="saga", C=c, max_iter=40, tol=1e-2)
        size = np.abs(lasso.fit(x, y).coef_).max(0)
        enough = np.count_nonzero(size) >= count
        low, high, best = (low, c, size) if enough else (c, high, best)
    return np.argsort(-best)[:count]


def folded(params, p):
    """The network of pixels, whose first kernel is the product of two factors."""
    first = jc.LowRankArray(jnp.asarray(p), params["in"]["kernel"], jnp.dtype("float32"))
    return params | {"in": params["in"] | {"kernel": first}}


def main(argv=None):
    """Prints accuracy and bytes by method and number of features."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--counts", nargs="*", type=int, default=[4, 9, 16, 32])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plot", help="a file for accuracy against features")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", ConvergenceWarning)
    x, y, test, answers = load(args.data)
    found = []

    def add(name, count, x, test, p=None):
        params, _ = train(
            cross_entropy(apply), init(jax.random.key(0), x.shape[1]), x, y, args.epochs
        )
        if p is not None:
            params = folded(params, p)
        right = jc.lift(apply)(params, test).argmax(-1) == answers
        row = {"method": name, "features": count, "accuracy": float(right.mean())}
        row["bytes"] = jc.nbytes(params)
        found.append(row)
        if not args.json:
            text = f"{name:12} {count:4} features  {row['accuracy']:6.1%}  {row['bytes']:8,} bytes"
            print(text, flush=True)

    add("all", x.shape[1], x, test)
    for count in args.counts:
        for name in ("pca", "lda"):
            # There are no more discriminants than classes less one.
            if name == "pca" or count < len(np.unique(y)):
                p = projection(name, x, y, count)
                add(name, count, x @ p, test, p)
        for name in ("variance", "lasso", "elimination"):
            own = chosen(name, x, y, count)
            add(name, len(own), x[:, own], test[:, own])
    if args.plot:
        _plot(found, args.plot)
    if args.json:
        print(json.dumps(found))
    return found


def _plot(found, path):
    plt = require("matplotlib.pyplot", extra="examples")
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in dict.fromkeys(row["method"] for row in found):
        rows = [(row["features"], row["accuracy"]) for row in found if row["method"] == name]
        axes.plot(*zip(*rows, strict=True), marker="o", label=name)
    axes.set(xscale="log", xlabel="features", ylabel="accuracy")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
