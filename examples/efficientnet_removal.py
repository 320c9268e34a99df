"""EfficientNet-Lite0's real weights lose channels; a linear probe says how much its features lose.

Norms are folded first, so that a kernel's size says what its channel adds. Then channels go until
90% and 80% of the operations are left: those of the smallest weights, or those whose removal, by
the derivatives of the probe's loss on 500 labelled images, changes it least. Biases then take up
the means of what went; or the smaller network learns the features of the whole one again, from
images without labels. A linear layer is fitted to the 1280 features of 3000 images of
Fashion-MNIST, before and after; printed is its accuracy on 1000 others.

    python -m examples.efficientnet_removal
    python -m examples.efficientnet_removal --quick      # to see it run

References:
    Molchanov et al., 2019, Importance Estimation for Neural Network Pruning. Nagel et al., 2019,
    Data-Free Quantization Through Weight Equalization and Bias Correction.
"""

import argparse
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.fetching import fetch
from examples.models.efficientnet import PENALTY, apply, batches, load, ridge
from jaxopt_compress.evaluation.timing import interleave
from jaxopt_compress.tree import map_named

HEAD = "head/**"


def features(params, images):
    """What the last layer sees, (n, 1280)."""
    width = params["head"]["kernel"].shape[0]
    return apply(params | {"head": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}}, images)


def probed(run, params, training, test):
    """Accuracy in percent of a linear layer that is fitted to features, and the layer."""

    def seen(parts):
        x = np.concatenate([run(params, images) for images, _ in parts])
        return x, np.concatenate([labels for _, labels in parts])

    kernel, bias = ridge(*seen(training), PENALTY)
    x, y = seen(test)
    return 100 * float(np.mean((x @ kernel + bias).argmax(-1) == y)), (kernel, bias)


def taylor(groups, fn, params, probe, parts):
    """Per unit the mean square of what the probe's loss changes by, to first order."""
    kernel, bias = map(jnp.asarray, probe)

    @jax.jit
    @jax.grad
    def slope(params, images, labels):
        logits = 10 * (fn(params, images) @ kernel + bias)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    changed = lambda p: p.grad * p.dense()
    found = [groups.scores(changed, "sum", grads=slope(params, *part)) for part in parts]
    return {name: np.mean([np.square(one[name]) for one in found], 0) for name in groups}


def with_means(fn, params, plan, parts):
    """Masked parameters whose biases have the means of what went."""
    images = parts[0][0]
    stats = jc.calibrate(fn, params, [x for x, _ in parts], measures=(jc.measures.means(),))
    with warnings.catch_warnings():
        # They are not stored: where few channels go, positions take more than they save.
        warnings.simplefilter("ignore", jc.LargerWarning)
        masked = jc.compress(params, plan.compression, uses=jc.uses(fn, params, images))
    is_bias = lambda path: path.endswith("bias")
    masked = map_named(lambda path, x: jc.materialize(x) if is_bias(path) else x, masked)
    return jc.materialize(jc.correct_biases(fn, params, masked, images, stats=stats).params)


def distilled(teacher, fn, params, parts, epochs, rate=3e-4):
    """The smaller parameters after training on the features of the whole ones."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, epochs * len(parts)))
    wanted = [teacher(images) for images, _ in parts]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, wanted):
        loss = lambda p: jnp.mean(jnp.square(fn(p, images) - wanted))
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    order = np.random.default_rng(0)
    for _ in range(epochs):
        for i in order.permutation(len(parts)):
            params, state = step(params, state, parts[i][0], wanted[i])
    return params


def run(shares=(0.9, 0.8), fitted=3000, tested=1000, calibrate=500, epochs=1, rounds=5, say=print):
    """Variant -> its figures."""
    whole = load(fetch("efficientnet_lite0"))
    (images, labels), (others, wanted) = fashion_mnist()
    training, test = batches(images, labels, fitted), batches(others, wanted, tested)
    images = training[0][0]
    fold = jc.fold_norms(features, whole, images[:2])
    fn, params = fold.function(features), fold.params
    seen, teacher = training[: calibrate // 100], jax.jit(fn)
    groups = jc.find_groups(fn, params, images, protect=HEAD)
    rows, timed = {}, {}

    def measured(name, run, params, flops):
        accuracy, probe = probed(run, params, training, test)
        rows[name] = {"accuracy": accuracy, "flops": flops, "bytes": jc.nbytes(params)}
        timed[name] = functools.partial(run, params, images)
        say(name, rows[name])
        return probe

    probe = measured("whole", teacher, params, 1.0)
    smallest, by_slope = groups.scores(), taylor(groups, fn, params, probe, seen)
    ready = []
    for share in shares:
        for by, scores in (("smallest weights", smallest), ("Taylor", by_slope)):
            plan = groups.plan(budget=jc.flops(share), scores=scores)
            rewrite, left = plan.rewrite(), plan.flops[1] / plan.flops[0]
            small = jax.jit(rewrite.function(fn))
            measured(f"{share:.0%}, {by}", small, rewrite.params, left)
        mended = plan.rewrite(with_means(fn, params, plan, seen)).params
        measured(f"{share:.0%}, Taylor, means in biases", small, mended, left)
        ready.append((share, small, mended, left))
    for share, small, mended, left in ready:
        new = distilled(functools.partial(teacher, params), small, mended, training, epochs)
        measured(f"{share:.0%}, Taylor, distilled", small, new, left)
    times = interleave(timed, rounds)
    for name, row in rows.items():
        pairs = zip(times["whole"].cpu, times[name].cpu, strict=True)
        row["speed"] = float(np.median([a / b for a, b in pairs]))
        say(name, row)
    return rows


def main():
    """Prints the figures of each variant as it is there."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8], help="that are left")
    parser.add_argument("--epochs", type=int, default=1, help="of distillation")
    parser.add_argument("--quick", action="store_true", help="of few images, and one share")
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args()
    say = (lambda *_: None) if args.json else _say
    if args.quick:
        rows = run([0.8], fitted=200, tested=100, calibrate=100, epochs=1, rounds=2, say=say)
    else:
        rows = run(args.shares, epochs=args.epochs, say=say)
    if args.json:
        print(json.dumps(rows))


def _say(name, row):
    print(f"{name:32} " + "  ".join(f"{k} {v:,.4g}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
