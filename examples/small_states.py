"""Optimizer states, parameters and computation in fewer bits than float32, on three kinds of data.

    images      LeNet-300-100 on Fashion-MNIST
    ratings     the recommender of `examples.movielens`, its tables of vectors included
    characters  the next character of the Brown corpus from the sixteen before it

AdamW with its state in float32, in 8 bits and in 4; then parameters in bfloat16, without a float32
copy, rounded stochastically (with the state in float32, and in 8 bits) or to the nearest; then
computation in bfloat16, and in float16 with and without a scaled loss, from float32 parameters.
Three seeds of initial weights and order, which all of these have in common, are trained at once by
vmap.
The spread of the three in float32 is what runs differ by themselves.

    python -m examples.small_states
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import jaxopt_compress as jc
from examples import movielens
from examples.data import brown, fashion_mnist, ml100k
from examples.models import lenet
from examples.models.common import dense
from examples.models.training import scaled

SEEDS, BEFORE = 3, 16


class Task(NamedTuple):
    """Something to train.

    Attributes:
        init: Key -> parameters.
        loss: ``loss(params, *batch)``.
        draw: ``draw(key, *data)``: a batch.
        data: To train with, arrays.
        held_out: A batch.
        rate: The highest learning rate.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]
    draw: Callable[..., tuple[Any, ...]]
    data: tuple[Any, ...]
    held_out: tuple[Any, ...]
    rate: float


def rows(size, key, *data):
    """Random rows of arrays."""
    chosen = jax.random.randint(key, (size,), 0, len(data[0]))
    return tuple(x[chosen] for x in data)


def cross_entropy(apply, params, inputs, labels):
    logits = apply(params, inputs).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def images():
    training, test = ((x, y.astype(np.int32)) for x, y in fashion_mnist())
    loss = functools.partial(cross_entropy, lenet.apply_300_100)
    return Task(lenet.init_300_100, loss, functools.partial(rows, 64), training, test, 1e-3)


def ratings():
    columns = lambda r: (r[:, 0].astype(np.int32), r[:, 1].astype(np.int32), np.float32(r[:, 2]))
    seen, held_out = map(columns, movielens.split(ml100k()[0]))
    loss = lambda p, users, films, y: jnp.mean(jnp.square(movielens.apply(p, users, films) - y))
    return Task(movielens.init, loss, functools.partial(rows, 512), seen, held_out, 3e-3)


def init_characters(key, classes=96, width=24, hidden=256):
    """Parameters, 127,840 in all."""
    keys = jax.random.split(key, 3)
    layer = lambda key, n, m: {"kernel": scaled(key, n, m), "bias": jnp.zeros(m)}
    return {
        "characters": {"embedding": jax.random.normal(keys[0], (classes, width))},
        "hidden": layer(keys[1], BEFORE * width, hidden),
        "head": layer(keys[2], hidden, classes),
    }


def next_character(params, ids):
    """Logits, (n, classes), after the characters before, (n, 16) (Bengio et al., 2003)."""
    x = params["characters"]["embedding"][ids].reshape(ids.shape[0], -1)
    return dense(params["head"], jax.nn.relu(dense(params["hidden"], x)))


def characters():
    """Every tenth document is held out, of which every hundredth place is read."""
    texts = [text for _, _, text in brown()]
    parts = "\n".join(texts[i] for i in range(len(texts)) if i % 10), "\n".join(texts[::10])
    # Printable ASCII, from the space on; what is none of it is the last class.
    codes = [np.frombuffer(t.encode("latin-1", "replace"), np.uint8) - 32 for t in parts]
    training, held_out = (np.minimum(c, 95).astype(np.int32) for c in codes)
    windows = held_out[np.arange(0, len(held_out) - BEFORE, 100)[:, None] + _AT]

    def draw(key, text):
        at = jax.random.randint(key, (128, 1), 0, len(text) - BEFORE) + _AT
        return text[at[:, :-1]], text[at[:, -1]]

    loss = functools.partial(cross_entropy, next_character)
    given = windows[:, :-1], windows[:, -1]
    return Task(init_characters, loss, draw, (training,), given, 2e-3)


_AT = np.arange(BEFORE + 1)
TASKS = {"images": images, "ratings": ratings, "characters": characters}


class Variant(NamedTuple):
    """How to train.

    Attributes:
        around: From AdamW to the optimizer.
        dtype: Of parameters.
        compute: Of activations and gradients.
    """

    around: Callable[..., optax.GradientTransformation] = lambda tx: tx
    dtype: str = "float32"
    compute: str | None = None


VARIANTS = {
    "float32": Variant(),
    "state in 8 bits": Variant(jc.small_states),
    "state in 4 bits": Variant(lambda tx: jc.small_states(tx, "float4_e2m1fn")),
    "bfloat16, stochastic": Variant(jc.stochastic_rounding, "bfloat16"),
    "bfloat16, stochastic, 8 bits": Variant(
        lambda tx: jc.stochastic_rounding(jc.small_states(tx)), "bfloat16"
    ),
    "bfloat16, to the nearest": Variant(dtype="bfloat16"),
    "computed in bfloat16": Variant(compute="bfloat16"),
    "computed in float16": Variant(compute="float16"),
    "computed in float16, scaled loss": Variant(jc.dynamic_loss_scale, compute="float16"),
}


class Run(NamedTuple):
    """Training of a task, as pure functions of a key.

    Attributes:
        task: The task.
        tx: The optimizer.
        variant: How.
    """

    task: Task
    tx: optax.GradientTransformation
    variant: Variant

    def begin(self, key):
        """Parameters and the state of the optimizer."""
        params = jax.tree.map(lambda w: w.astype(self.variant.dtype), self.task.init(key))
        return params, self.tx.init(params)

    def step(self, data, now, key):
        """One more step."""
        params, state = now
        loss, scale = self.task.loss, 1.0
        if compute := self.variant.compute:
            loss = jc.mixed_precision(loss, compute)
        if self.variant.around is jc.dynamic_loss_scale:
            scale = jc.loss_scale(state)
        scaled = lambda *args: scale * loss(*args)
        grads = jax.grad(scaled)(params, *self.task.draw(key, *data))
        updates, state = self.tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def loss(self, steps, key, data, held_out):
        """The loss on held-out data after so many steps."""
        first, rest = jax.random.split(key)
        step, keys = functools.partial(self.step, data), jax.random.split(rest, steps)
        (params, _), _ = jax.lax.scan(step, self.begin(first), keys)
        return self.task.loss(params, *held_out)


def measured(task, steps):
    """A row for each variant."""
    found = []
    adamw = optax.adamw(optax.cosine_decay_schedule(task.rate, steps), weight_decay=1e-2)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    # Not constants of the program, which take long to compile.
    given = jax.tree.map(jnp.asarray, (task.data, task.held_out))
    for name, variant in VARIANTS.items():
        run = Run(task, variant.around(adamw), variant)
        all_seeds = jax.vmap(functools.partial(run.loss, steps), (0, None, None))
        losses = np.asarray(jax.jit(all_seeds)(keys, *given))
        row = {"variant": name, "losses": losses.tolist()}
        sizes = map(jc.nbytes, jax.eval_shape(run.begin, keys[0]))
        row |= dict(zip(("parameter bytes", "state bytes"), sizes, strict=True))
        # By seed: the same initial weights, and the same batches.
        row["more"] = float(np.mean(losses - (found[0]["losses"] if found else losses)))
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def main(argv=None):
    """Trains all of it, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    found = {name: measured(TASKS[name](), args.steps) for name in args.tasks}
    if args.json:
        print(json.dumps(found))
        return found
    for name, rows in found.items():
        spread = np.ptp(rows[0]["losses"])
        title = f"{name}: the three seeds in float32 differ by {spread:.4f}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
        for column in ("variant", "loss by seed", "more", "parameter bytes", "state bytes"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for row in rows:
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
            sizes = (f"{row[f'{kind} bytes']:,}" for kind in ("parameter", "state"))
            table.add_row(row["variant"], losses, f"{row['more']:+.4f}", *sizes)
        Console().print(table)
    return found


if __name__ == "__main__":
    main()
