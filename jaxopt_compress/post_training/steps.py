"""Steps of a training that can be interrupted, and the folder from which a later run goes on."""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import optax

from jaxopt_compress.extras import require
from jaxopt_compress.storage import load, save
from jaxopt_compress.typing import PyTree

# Seconds from one save to the next.
_APART = 60.0


def descend(
    loss: Callable[..., jax.Array],
    start: PyTree,
    others: Callable[[int], tuple[PyTree, ...]],
    tx: optax.GradientTransformation,
    steps: int,
    *,
    resume: str | os.PathLike[str] | None = None,
    fingerprint: Callable[[], str],
    progress: bool = False,
) -> PyTree:
    """What ``steps`` steps along the gradient make of ``start``, a tree of arrays.

    Args:
        loss: ``loss(tree, *others(i)) -> scalar``.
        start: Where to begin.
        others: What else the loss takes at a step.
        tx: The optimizer.
        steps: How many there are.
        resume: A folder that gets the tree once a minute, and from which a later run goes on, to
            the same result bit for bit.
        fingerprint: Says what the run depends on.
        progress: Whether a bar is shown; needs the extra ``cli``.

    Raises:
        ValueError: The folder belongs to another run.
    """

    @jax.jit
    def step(tree: PyTree, state: optax.OptState, *others: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss)(tree, *others), state, tree)
        return optax.apply_updates(tree, updates), state

    now, done, place = (start, tx.init(start)), 0, None
    if resume is not None:
        place = open_folder(resume, fingerprint()) / "steps"
    if place is not None and place.exists():
        kept = load(place, like={"done": np.int64(0), "now": now})
        now, done = kept["now"], int(kept["done"])
    last = time.monotonic()
    for i in _tracked(range(done, steps), steps, progress):
        # Steps wait for each other, so that a bar tells the truth and inputs do not pile up.
        now = jax.block_until_ready(step(*now, *others(i)))
        if place is not None and (i + 1 == steps or time.monotonic() >= last + _APART):
            save(place, {"done": np.int64(i + 1), "now": now}, overwrite=True)
            last = time.monotonic()
    return now[0]


def open_folder(folder: str | os.PathLike[str], fingerprint: str) -> Path:
    """The folder of a run, made if there is none.

    Raises:
        ValueError: It belongs to another run.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    mark = path / "run.json"
    if not mark.exists():
        beside = mark.with_name(f"{mark.name}.part")
        beside.write_text(json.dumps({"fingerprint": fingerprint}))
        os.replace(beside, mark)
    elif json.loads(mark.read_text())["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} holds a run with another function or recipe, or other parameters, batches "
            "or options: pass the same ones, or another folder"
        )
    return path


def _tracked(left: range, steps: int, progress: bool) -> Iterable[int]:
    if not progress:
        return left
    track = require("rich.progress", extra="cli").track
    return track(left, "training", total=steps, completed=left.start, transient=True)
