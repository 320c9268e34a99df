"""Codes chosen together, by what a function returns and not by one product after the other."""

import math
import os
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxopt_compress.arrays import QuantizedArray, SparseArray
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.lift import lift
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.groups import spread_to
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.packing import pack
from jaxopt_compress.numerics.solvers.ada_round import between, logit, pull_at
from jaxopt_compress.post_training.fingerprint import fingerprint
from jaxopt_compress.post_training.outputs import as_arguments, squares
from jaxopt_compress.post_training.steps import descend
from jaxopt_compress.tree import Where, map_named, named_leaves, select
from jaxopt_compress.typing import PyTree

_WEIGHT = 30.0  # of the pull, beside a relative error of 1


def learn_rounding(
    fn: Callable[..., PyTree],
    params: PyTree,
    small: PyTree,
    batches: Iterable[PyTree],
    where: Where = None,
    *,
    steps: int = 300,
    rate: float = 5e-2,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PyTree:
    r"""Chooses the codes of all weights together, so that a function's outputs change little.

    `gptq` and `auto_round` look at the products with one parameter. Here ``fn`` may be a block of a
    network, or the whole. Each code becomes one of the two next to the dense entry, by a soft
    choice :math:`h(V) \in [0, 1]` that is driven to 0 or 1,

    .. math:: \min_V \; \frac{\sum (f(\hat W(V)) - f(W))^2}{\sum (f(\hat W) - f(W))^2}
        + \lambda \, \mathrm{mean}(1 - |2 h(V) - 1|^\beta)

    by Adam, a batch for each step, with :math:`\lambda = 30`. Steps and zero points stay. Where the
    error over all batches is not smaller in the end, so do the codes.

    Args:
        fn: Any differentiable JAX function, called as ``fn(params, *batch)`` if a batch is a tuple,
            else as ``fn(params, batch)``.
        params: Its dense parameters.
        small: What they were compressed to, by any method.
        batches: What ``fn`` is called on; equal shapes share a program. Of a block: the activations
            in front of it, such as `capture` returns, of the dense or the compressed function.
        where: Which of the leaves of integer codes; by default all.
        steps: How many steps of Adam.
        rate: Its learning rate.
        resume: A folder. What has been learned is kept in it once a minute, and a later call with
            the same arguments goes on from there, to the same result bit for bit.
        progress: Whether a bar is shown; needs the extra ``cli``.

    Returns:
        ``small`` with other codes.

    Raises:
        ValueError: No leaf is a `QuantizedArray` of integers with a code for each entry; there is
            no batch; or outputs are not finite; or ``resume`` belongs to another run.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0))
        >>> params = {"w": jax.random.normal(keys[0], (16, 16))}
        >>> fn, x = lambda p, x: jnp.tanh(x @ p["w"]), jax.random.normal(keys[1], (256, 16))
        >>> small = jc.compress(params, jc.quantize("int2"), uses=jc.uses(fn, params, x))
        >>> better = jc.learn_rounding(fn, params, small, [x])
        >>> error = lambda p: jnp.linalg.norm(jc.lift(fn)(p, x) - fn(params, x))
        >>> bool(error(better) < error(small))
        True

    References:
        Nagel et al., 2020, Up or Down? Adaptive Rounding for Post-Training Quantization. Li et al.,
        2021, BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction.
    """
    given = as_arguments(batches)
    chosen = _chosen(small, where)
    if not given or steps < 1:
        raise ValueError(f"{len(given)} batches and steps={steps}; at least 1 of each")
    dense, run = dict(named_leaves(params)), jax.jit(lift(fn))
    sides = {path: _next_to(dense[path], leaf) for path, leaf in chosen.items()}
    pairs = [(batch, run(params, *batch)) for batch in given]
    error = lambda tree, batch, want: squares(lift(fn)(tree, *batch), want)
    measured = jax.jit(error)
    over_all = lambda tree: sum(float(measured(tree, *pair)) for pair in pairs)
    before = over_all(small)
    if not math.isfinite(before):
        raise ValueError(
            f"the squared error of fn's outputs over all batches is {before}: leave out what has "
            "outputs that are not finite, such as rows of padding alone"
        )
    unit = max(before / len(pairs), float(jnp.finfo(jnp.float32).tiny))

    def loss(
        up: dict[str, jax.Array],
        ends: dict[str, tuple[jax.Array, jax.Array]],
        tree: PyTree,
        batch: tuple[PyTree, ...],
        want: PyTree,
    ) -> jax.Array:
        between_ends = lambda h, pair: pair[0] + (h * (pair[1] - pair[0])).astype(pair[0].dtype)
        values = {path: between_ends(h, ends[path]) for path, h in up.items()}
        soft = map_named(lambda path, x: values.get(path, x), tree)
        return error(soft, batch, want) / unit

    ends = {path: tuple(x.materialize() for x in pair) for path, pair in sides.items()}
    start = {path: _start(dense[path], *pair) for path, pair in ends.items()}
    rest = lambda i: (jnp.float32(i / steps), ends, small, *pairs[i % len(pairs)])
    depends = params, small, given, where, steps, rate
    soft = descend(
        _pulled(loss, start),
        start,
        rest,
        optax.adam(rate),
        steps,
        resume=resume,
        fingerprint=lambda: fingerprint(str(jax.make_jaxpr(fn)(params, *given[0])), *depends),
        progress=progress,
    )
    up = {path: between(x) >= 0.5 for path, x in soft.items()}
    codes = {path: _either(leaf, *sides[path], up[path]) for path, leaf in chosen.items()}
    made = map_named(lambda path, x: codes.get(path, x), small)
    return made if over_all(made) < before else small


def _pulled(loss: Callable[..., jax.Array], v: Mapping[str, jax.Array]) -> Callable[..., jax.Array]:
    """The loss at soft choices, and the pull that drives them to one of their ends."""
    count = sum(x.size for x in v.values())

    def whole(v: dict[str, jax.Array], at: jax.Array, *rest: PyTree) -> jax.Array:
        up, pull = jax.tree.map(between, v), pull_at(at)
        return loss(up, *rest) + _WEIGHT * sum(jnp.sum(pull(h)) for h in up.values()) / count

    return whole


def _chosen(small: PyTree, where: Where) -> dict[str, QuantizedArray]:
    """The leaves of integers with a code for each entry."""
    takes = lambda x: (
        isinstance(x, QuantizedArray)
        and isinstance(x.fmt.grid, Integers)
        and not isinstance(x.codes, SparseArray)
    )
    named = None if where is None else set(select(small, where))
    found = {k: x for k, x in named_leaves(small) if takes(x) and (named is None or k in named)}
    others = sorted((named or set()) - set(found))
    if others or not found:
        kinds = {k: type(x).__name__ for k, x in named_leaves(small)}
        met = ", ".join(f"{k!r} is a {kinds[k]}" for k in others or kinds)
        raise ValueError(
            "learn_rounding takes leaves that are a QuantizedArray of integers, with a code for "
            f"each entry; {met}: quantize them first, or leave them out by where="
        )
    return found


def _next_to(w: jax.Array, leaf: QuantizedArray) -> tuple[QuantizedArray, QuantizedArray]:
    """The nearest codes on the grid of a leaf, and those on the other side of the entries."""
    fmt, w = leaf.fmt, w.astype(jnp.float32)
    wide = lambda x: None if x is None else spread_to(x, leaf.cuts, leaf.shape)
    scale = spread_to(steps_of(leaf.scale), leaf.cuts, leaf.shape)
    levels, _ = round_to_grid(w, scale, wide(leaf.zero), fmt)
    near = leaf.replace(codes=encode(levels, fmt), block=None)
    side = jnp.sign(w - near.materialize().astype(jnp.float32))
    other = jnp.clip(levels + side, fmt.grid.low, fmt.grid.high)
    return near, near.replace(codes=encode(other, fmt))


def _start(w: jax.Array, near: jax.Array, far: jax.Array) -> jax.Array:
    """The soft choice that stands for the dense entries."""
    width = far.astype(jnp.float32) - near.astype(jnp.float32)
    share = (w.astype(jnp.float32) - near.astype(jnp.float32)) / jnp.where(width == 0, 1, width)
    return logit(jnp.clip(jnp.where(width == 0, 0, share), 0.01, 0.99))


def _either(
    leaf: QuantizedArray, near: QuantizedArray, far: QuantizedArray, up: jax.Array
) -> QuantizedArray:
    """A leaf with the far codes where the choice is up, packed as its own."""
    codes = jnp.where(up, far.codes, near.codes)
    if leaf.block is not None and leaf.axis is not None:
        codes = pack(codes, leaf.bits, leaf.axis, leaf.block)
    return leaf.replace(codes=codes)
