"""The floats of a stored form, trained so that a function returns what it did before."""

import math
import os
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import optax

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.lift import lift
from jaxopt_compress.post_training.fingerprint import fingerprint
from jaxopt_compress.post_training.outputs import as_arguments, relative_squares
from jaxopt_compress.post_training.steps import descend
from jaxopt_compress.tree import combine, map_named, partition
from jaxopt_compress.typing import PyTree


def distill(
    fn: Callable[..., PyTree],
    params: PyTree,
    small: PyTree,
    batches: Iterable[PyTree],
    where: str | Sequence[str] | None = None,
    *,
    loss: Callable[[PyTree, PyTree], jax.Array] = relative_squares,
    held_out: Iterable[PyTree] = (),
    steps: int = 100,
    rate: float = 3e-3,
    optimizer: optax.GradientTransformation | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PyTree:
    r"""Trains the floats of a compressed tree to return what the dense one does.

    Codes, masks and the form of each leaf stay; trained are scales, centroids, factors, the kept
    entries of sparse leaves, and dense parameters that ``where`` names. No labels are needed:

    .. math:: \min_\theta \; \mathrm{E}_x \, \ell(f(\hat W_\theta, x), f(W, x))

    A batch is a step. Where codes or sparsity should change, train by `compressed_training`.

    Args:
        fn: Any differentiable JAX function, called as ``fn(params, *batch)`` if a batch is a tuple,
            else as ``fn(params, batch)``.
        params: Its dense parameters: the teacher.
        small: What they were compressed to, by any method.
        batches: What ``fn`` is called on, in order and again; equal shapes share a program.
        where: Globs of the arrays to train, fields of compressed leaves included, as `partition`
            takes them, such as ``("**/scale", "**/bias")``. By default all floats of compressed
            leaves.
        loss: ``loss(outputs, the teacher's) -> scalar``. By default the sum of squared differences
            over that of the teacher's outputs; for logits `distillation.soft_targets`.
        held_out: Batches on which the tree has to be better in the end; where it is not, ``small``
            is returned. By default this is not asked.
        steps: How many steps.
        rate: The learning rate of Adam, relative to the sizes of what is trained: of each scale by
            itself, and elsewhere of rows and columns, so that entries of a stack, or channels, of
            other magnitudes do not disturb each other. It falls to 0 by a cosine.
        optimizer: Another one, of arrays that are divided by these sizes.
        resume: A folder. What has been learned is kept in it once a minute, and a later call with
            the same arguments goes on from there, to the same result bit for bit.
        progress: Whether a bar is shown; needs the extra ``cli``.

    Returns:
        ``small`` with other floats, of the same dtypes.

    Raises:
        ValueError: There is no batch, or nothing to train; or training has diverged; or ``resume``
            belongs to another run.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0))
        >>> params = {"w": jax.random.normal(keys[0], (16, 16))}
        >>> fn, x = lambda p, x: jnp.tanh(x @ p["w"]), jax.random.normal(keys[1], (256, 16))
        >>> small = jc.compress(params, jc.quantize("int2"), uses=jc.uses(fn, params, x))
        >>> better = jc.distill(fn, params, small, [x])
        >>> error = lambda p: jnp.linalg.norm(jc.lift(fn)(p, x) - fn(params, x))
        >>> bool(error(better) < error(small))
        True

    References:
        Hinton et al., 2015, Distilling the Knowledge in a Neural Network. Chen et al., 2024,
        EfficientQAT: Efficient Quantization-Aware Training for Large Language Models.
    """
    given, tests = as_arguments(batches), as_arguments(held_out)
    floats, rest = _halves(small, where)
    if not given or steps < 1:
        raise ValueError(f"{len(given)} batches and steps={steps}; at least 1 of each")
    # Floats that contribute little to the outputs have gradients far below Adam's usual eps.
    rates = optax.cosine_decay_schedule(rate, steps)
    tx = optimizer or optax.adam(rates, b2=0.99, eps=1e-15)
    run = lift(fn)
    arrays, treedef = jax.tree.flatten(floats)
    sizes = list(map(_sizes, arrays))

    def stored(own: list[jax.Array], sizes: list[jax.Array], rest: PyTree) -> PyTree:
        at_size = lambda x, size, old: (x * size).astype(old.dtype)
        return combine(treedef.unflatten(map(at_size, own, sizes, arrays)), rest)

    def error(own: list[jax.Array], sizes: PyTree, rest: PyTree, *given: PyTree) -> jax.Array:
        params, batch = given
        return loss(run(stored(own, sizes, rest), *batch), run(params, *batch))

    start = [x.astype(size.dtype) / size for x, size in zip(arrays, sizes, strict=True)]
    depends = params, small, given, where, loss, steps, rate, optimizer
    trained = descend(
        error,
        start,
        lambda i: (sizes, rest, params, given[i % len(given)]),
        tx,
        steps,
        resume=resume,
        fingerprint=lambda: fingerprint(str(jax.make_jaxpr(fn)(params, *given[0])), *depends),
        progress=progress,
    )
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in trained):
        raise ValueError(
            f"training with rate={rate} has diverged: lower it, and see that the outputs of all "
            "batches are finite"
        )
    measured = jax.jit(error)
    over_all = lambda own: math.fsum(float(measured(own, sizes, rest, params, x)) for x in tests)
    if tests and not over_all(trained) < over_all(start):
        return small
    return stored(trained, sizes, rest)


def _sizes(x: jax.Array) -> jax.Array:
    """How large entries are, of the shape of ``x``, in float32 at least; never 0.

    That of positive arrays, such as steps, are themselves. Others follow the root mean squares of
    rows and columns, as in the second moments of Adafactor (Shazeer and Stern, 2018).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if bool(jnp.all(x > 0)):
        return x
    square = jnp.square(x)
    whole = square.mean(range(max(0, x.ndim - 2), x.ndim), keepdims=True)
    if x.ndim > 1:
        rows, columns = square.mean(-1, keepdims=True), square.mean(-2, keepdims=True)
        square = rows * columns / jnp.where(whole > 0, whole, 1)
    else:
        square = jnp.broadcast_to(whole, x.shape)
    # What is 0 moves as the rest of its matrix, and where all is 0 as if that were of size 1.
    square = jnp.where(square > 0, square, jnp.where(whole > 0, whole, 1))
    return jnp.sqrt(square)


def _halves(small: PyTree, where: str | Sequence[str] | None) -> tuple[PyTree, PyTree]:
    """What is trained, and everything else."""
    floats, _ = partition(small, where)
    if where is None:
        floats = map_named(lambda _, x: x if is_compressed(x) else None, floats)
    if not jax.tree.leaves(floats):
        raise ValueError(
            "there are no floats in compressed leaves to train: compress first, or name dense "
            "arrays by where="
        )
    missing = lambda x: x is None
    rest = jax.tree.map(lambda f, x: x if f is None else None, floats, small, is_leaf=missing)
    return floats, rest
