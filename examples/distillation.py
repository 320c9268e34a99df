"""A compressed student learns from a larger teacher, beside the same training on labels alone.

The teacher is the ResNet of `examples.models.resnet` on Fashion-MNIST; its logits on the training
images are computed once and kept. The student is LeNet-300-100 with 95% of its weights
pruned and the others in int4, trained from the start in its compressed form, several times with
other seeds. Prints accuracy with 95% intervals, and the gain per seed.

    python -m examples.distillation [--epochs 6] [--seeds 3] [--temperature 2] [--share 0.5]
"""

import argparse
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.models import lenet, resnet
from examples.models.training import batches

BATCH = 128


def trained_teacher(training, epochs):
    """The teacher's logits of the training images, (60000, 10), and its variables."""
    images, labels = training
    variables = resnet.trained(images, labels, epochs)
    kept = jc.distillation.remember(resnet.apply, variables, np.split(images, 60))
    return np.concatenate(list(track(kept, "teacher", total=60, transient=True))), variables


def student(steps):
    """The compression of the student: pruned along a schedule, then int4."""
    prune = jc.prune(
        jc.scores.magnitude(),
        jc.schedules.polynomial(0.95, begin=steps // 10, end=steps // 2, every=20),
        where=lenet.WEIGHTS,
    )
    return jc.chain(prune, jc.quantize("int4", where=lenet.WEIGHTS))


def train(training, targets, share, temperature, epochs, seed):
    """Trains a student; ``share`` of its loss is that of distillation.

    Args:
        training: Images and labels.
        targets: The teacher's logits.
        share: From 0, labels alone, to 1.
        temperature: Of soft targets.
        epochs: How often each image is seen.
        seed: Of parameters and of the order of images.

    Returns:
        The compressed student.
    """
    images, labels = jnp.asarray(training[0]), jnp.asarray(training[1], jnp.int32)
    targets, per_epoch = jnp.asarray(targets), len(labels) // BATCH
    params = lenet.init_300_100(jax.random.key(seed))
    c = student(epochs * per_epoch)
    rate = optax.cosine_decay_schedule(2e-3, epochs * per_epoch)
    uses = jc.uses(lenet.apply_300_100, params, images[:2])
    tx = jc.compressed_training(optax.adamw(rate, weight_decay=1e-2), c, uses=uses)

    def loss(view, rows):
        logits = lenet.apply_300_100(view, images[rows])
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        soft = jc.distillation.soft_targets(logits, targets[rows], temperature)
        return jnp.mean((1 - share) * hard + share * soft)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params, state, order):
        def step(carry, rows):
            params, state = carry
            grads = jax.grad(loss)(c.view(params, state), rows)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    state = tx.init(params)
    for key in jax.random.split(jax.random.key(1000 + seed), epochs):
        order = jax.random.permutation(key, len(labels))[: per_epoch * BATCH]
        params, state = epoch(params, state, order.reshape(-1, BATCH))
    return jc.compress(params, c, state=state)


def interval(values):
    """The mean and the half width of its 95% interval, by Student's t."""
    values = np.asarray(values)
    if len(values) < 2:
        return float(values.mean()), math.nan
    width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(width)


def main(argv=None):
    """Trains teacher and students, and prints their accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--teacher-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--share", type=float, default=0.5, help="of the loss from the teacher")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    training, test = fashion_mnist()
    targets, variables = trained_teacher(training, args.teacher_epochs)
    accuracy = lambda fn, params: (
        100 * jc.evaluate(fn, params, batches(*test), ["accuracy"])["accuracy"]
    )
    found = {"teacher": accuracy(resnet.apply, variables), "labels": [], "teacher's": []}
    for seed in track(range(args.seeds), "students", transient=True):
        for name, share in (("labels", 0.0), ("teacher's", args.share)):
            small = train(training, targets, share, args.temperature, args.epochs, seed)
            found[name].append(accuracy(lenet.apply_300_100, small))
    gains = np.subtract(found["teacher's"], found["labels"])
    found |= {"gain": list(map(float, gains)), "bytes": jc.nbytes(small)}
    if args.json:
        print(json.dumps(found))
        return found
    table = Table(title="Fashion-MNIST, LeNet-300-100, 95% pruned + int4", caption_justify="left")
    for column in ("trained on", "accuracy %", "+-", "per seed"):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    table.add_row("(the teacher)", f"{found['teacher']:.2f}", "", "")
    labels = {"labels": "labels", "teacher's": "labels and the teacher's logits", "gain": "gain"}
    for name, label in labels.items():
        mean, width = interval(found[name])
        seeds = " ".join(f"{x:.2f}" for x in found[name])
        table.add_row(label, f"{mean:.2f}", f"{width:.2f}", seeds)
    table.caption = f"{found['bytes']:,} bytes a student"
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
