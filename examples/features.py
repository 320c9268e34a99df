"""Fewer input features: a projection that is fitted beforehand, folded into the first kernel.

A small network on scikit-learn's digits sees 64 pixels by way of fewer numbers: the leading
principal components (PCA), the directions that tell classes apart (LDA, at most 9 for 10 classes),
or pixels that are chosen by L1-penalized regression or by recursive elimination. The projection
and the first kernel are one matrix afterwards: what is stored is a product of thin factors, or a
kernel without the rows of pixels that are left out.

    python -m examples.features [--counts 4 9 16 32] [--steps 400]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import RFE
from sklearn.linear_model import LogisticRegression

import jaxopt_compress as jc

HIDDEN = 64


def network(params, x):
    """Logits of images, (n, features)."""
    hidden = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def trained(x, y, steps):
    """The network after ``steps`` steps on all images."""
    keys = jax.random.split(jax.random.key(0), 2)
    layer = lambda key, k, n: {
        "kernel": jax.random.normal(key, (k, n)) * (2 / k) ** 0.5,
        "bias": jnp.zeros(n),
    }
    params = {"in": layer(keys[0], x.shape[1], HIDDEN), "out": layer(keys[1], HIDDEN, 10)}
    tx = optax.adamw(3e-3)

    @jax.jit
    def step(carry, _):
        params, state = carry
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(network(p, x), y).mean()
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0][0]


def projections(x, y, count):
    """Name -> a matrix (64, features) and the mean that is taken off before."""
    pca = PCA(count).fit(x)
    found = {"PCA": (pca.components_.T, pca.mean_)}
    if count <= 9:
        lda = LinearDiscriminantAnalysis(n_components=count).fit(x, y)
        found["LDA"] = (lda.scalings_[:, :count], lda.xbar_)
    linear = LogisticRegression(penalty="l1", solver="liblinear", C=0.05).fit(x, y)
    largest = np.argsort(-np.abs(linear.coef_).sum(0))[:count]
    kept = np.flatnonzero(
        RFE(LogisticRegression(max_iter=200), n_features_to_select=count, step=4).fit(x, y).support_
    )
    for name, pixels in (("L1", largest), ("elimination", kept)):
        found[name] = (np.eye(x.shape[1])[:, pixels], np.zeros(x.shape[1]))
    return found


def folded(params, matrix, mean):
    """The network of whole images that first projects them."""
    matrix, mean = (jnp.asarray(a, jnp.float32) for a in (matrix, mean))
    product = jc.LowRankArray(matrix, params["in"]["kernel"], jnp.dtype("float32"))
    bias = params["in"]["bias"] - mean @ product.materialize()
    return {**params, "in": {"kernel": product, "bias": bias}}


def main(argv=None):
    """Prints the accuracy of each way to choose features, by their number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", nargs="*", type=int, default=[4, 9, 16, 32])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args(argv)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits["target"]))
    x, y = digits["data"][order].astype(np.float32) / 16, digits["target"][order]
    cut, found = 1297, {}
    score = lambda p: jc.evaluate(jc.lift(network), p, [(x[cut:], y[cut:])], ["accuracy"])
    found[64, "all pixels"] = score(trained(x[:cut], y[:cut], args.steps))["accuracy"]
    for count in args.counts:
        for name, (matrix, mean) in projections(x[:cut], y[:cut], count).items():
            seen = jnp.asarray((x[:cut] - mean) @ matrix, jnp.float32)
            params = folded(trained(seen, y[:cut], args.steps), matrix, mean)
            found[count, name] = score(params)["accuracy"]
    for (count, name), accuracy in found.items():
        print(f"{count:3} features  {name:12} {accuracy:6.1%}")
    return found


if __name__ == "__main__":
    main()
