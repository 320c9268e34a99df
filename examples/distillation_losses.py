"""Every distillation loss on one pair of networks, beside training on labels alone.

The teacher is the ResNet of `examples.models.resnet`, trained on all of Fashion-MNIST. The student
has a quarter of its width and sees few images, of which the teacher's logits and features are kept;
the student's features come from `jaxopt_compress.capture`, so neither network knows of it. Accuracy
on the 10000 test images, with 95% intervals, and the gain over labels of the same seed.

    python -m examples.distillation_losses [--images 6000] [--epochs 10] [--seeds 3]
"""

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxopt_compress as jc
from examples.data import fashion_mnist
from examples.distillation import interval
from examples.models import resnet
from examples.models.training import batches, train

D = jc.distillation
STUDENT = resnet.ResNet(blocks=((8, 2), (16, 2), (16, 1)))
MAPS, HEAD = "params/Block_2/Conv_1/kernel", "params/head/kernel"

# Name -> (share of labels, weight, loss). What a loss sees of each network: logits, maps
# (n, 4, 4, channels) of the last block, features (n, channels) before the head, and labels.
LOSSES: dict[str, tuple[float, float, Any]] = {
    "labels": (1.0, 0.0, lambda s, t, _: 0.0),
    "soft_targets": (0.5, 0.5, lambda s, t, _: D.soft_targets(s["logits"], t["logits"])),
    "decoupled": (1.0, 0.5, lambda s, t, y: D.decoupled(s["logits"], t["logits"], y)),
    "jensen_shannon": (0.5, 8.0, lambda s, t, _: D.jensen_shannon(s["logits"], t["logits"])),
    "reverse_kl": (0.5, 0.5, lambda s, t, _: D.reverse_kl(s["logits"], t["logits"])),
    "top_k": (0.5, 0.5, lambda s, t, _: D.top_k(s["logits"], D.keep_top_k(t["logits"], 3))),
    "projected": (1.0, 1.0, lambda s, t, _: D.projected(s["maps"], t["maps"], s["projection"])),
    "attention_transfer": (1.0, 2.0, lambda s, t, _: D.attention_transfer(s["maps"], t["maps"])),
    "relational_distances": (
        1.0,
        2.0,
        lambda s, t, _: D.relational_distances(s["features"], t["features"]),
    ),
    "relational_angles": (
        1.0,
        2.0,
        lambda s, t, _: D.relational_angles(s["features"][:32], t["features"][:32]),
    ),
    "contrastive": (
        1.0,
        0.2,
        lambda s, t, _: D.contrastive(s["features"] @ s["projection"], t["features"]),
    ),
}


def seen(network, variables, images, **kwargs):
    """Logits, maps and features of a network, and what else it returns."""
    x = images[..., None] / jnp.float32(255)
    call = lambda v, x: network.apply(v, x, **kwargs)
    inputs = jc.capture(call, HEAD, "input")
    (out, before), maps = jc.capture(inputs, MAPS)(variables, x)
    logits, rest = out if isinstance(out, tuple) else (out, None)
    return {"logits": logits, "maps": maps[MAPS][0], "features": before[HEAD][0]}, rest


def taught(images, labels, variables):
    """Images and labels, with what the teacher makes of each image."""
    run = jax.jit(lambda x: seen(resnet.MODEL, variables, x)[0])
    parts = [run(images[i : i + 500]) for i in range(0, len(images), 500)]
    known = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    return (images, known), labels


def student(name, data, epochs, seed):
    """Variables of a student that was trained with one of the losses."""
    share, weight, distilled = LOSSES[name]
    init, project = jax.random.split(jax.random.key(seed))
    variables = STUDENT.init(init, jnp.zeros((1, 28, 28, 1)))
    params = {"network": variables["params"], "projection": D.projection(project, 16, 64)}

    def objective(params, averages, inputs, labels):
        images, teacher = inputs
        variables = {"params": params["network"], "batch_stats": averages}
        own, new = seen(STUDENT, variables, images, train=True, mutable=["batch_stats"])
        own |= {"projection": params["projection"]}
        hard = optax.softmax_cross_entropy_with_integer_labels(own["logits"], labels)
        loss = share * hard.mean() + weight * jnp.mean(distilled(own, teacher, labels))
        return loss, new["batch_stats"]

    params, averages = train(
        objective, params, *data, epochs, variables["batch_stats"], rate=5e-3, seed=seed
    )
    return {"params": params["network"], "batch_stats": averages}


def main(argv=None):
    """Trains the teacher and a student per loss and seed, and prints their accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6000, help="that students see")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--teacher-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    (images, labels), test = fashion_mnist()
    variables = resnet.trained(images, labels, args.teacher_epochs)
    data = taught(images[: args.images], labels[: args.images], variables)
    apply = lambda v, x: STUDENT.apply(v, x[..., None] / jnp.float32(255))
    accuracy = lambda fn, v: 100 * jc.evaluate(fn, v, batches(*test), ["accuracy"])["accuracy"]
    found: dict[str, Any] = {"teacher": accuracy(resnet.apply, variables)}
    for name in track(dict.fromkeys(["labels", *args.losses]), "losses", transient=True):
        own = [student(name, data, args.epochs, seed) for seed in range(args.seeds)]
        found[name] = [accuracy(apply, v) for v in own]
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(found))
        return found
    table = Table(title=f"Fashion-MNIST, {args.images} images, a student of a quarter of the width")
    for column in ("loss", "accuracy %", "+-", "gain", "+-"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    table.add_row("(the teacher, all images)", f"{found.pop('teacher'):.2f}", "", "", "")
    for name, values in found.items():
        mean, width = interval(values)
        gain = interval(np.subtract(values, found["labels"])) if name != "labels" else None
        more = [f"{x:.2f}" for x in gain] if gain else ["", ""]
        table.add_row(name, f"{mean:.2f}", f"{width:.2f}", *more)
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
