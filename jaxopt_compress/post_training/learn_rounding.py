"""Codes chosen together, by what a function returns and not by one product after the other."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_compress.arrays import QuantizedArray, SparseArray, materialize
from jaxopt_compress.lift import lift
from jaxopt_compress.arrays.quantized import steps_of
from jaxopt_compress.numerics.codes import encode, round_to_grid
from jaxopt_compress.numerics.groups import spread_to
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.packing import pack
from jaxopt_compress.numerics.solvers.ada_round import between, logit, pull_at
from jaxopt_compress.tree import Where, map_named, named_leaves, select
from jaxopt_compress.tree.paths import is_float

_WEIGHT = 30.0  # of the pull, beside a relative error of 1


def learn_rounding(
    fn: Callable[..., Any],
    params: Any,
    small: Any,
    batches: Iterable[Any],
    where: Where = None,
    *,
    steps: int = 300,
    rate: float = 5e-2,
) -> Any:
    r"""Chooses codes anew so that a function's outputs change little, those of all weights together.

    `gptq` and `auto_round` look at the products with one parameter. Here ``fn`` may be a block of a
    network, or the whole: each code may move to the next one on the side where the dense entry
    lies, by a soft choice :math:`h(V) \in [0, 1]` that is driven to 0 or 1,

    .. math:: \min_V \; \frac{\sum (f(\hat W(V)) - f(W))^2}{\sum (f(\hat W(0)) - f(W))^2}
        + \lambda \, \mathrm{mean}(1 - |2 h(V) - 1|^\beta)

    by Adam, a batch for each step. Steps and zero points stay. Where the error over all batches has
    not become smaller in the end, the codes stay as they were.

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

    Returns:
        ``small`` with other codes.

    Raises:
        ValueError: No leaf is a `QuantizedArray` of integers with a code for each entry, or there
            is no batch.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {k: jax.random.normal(key, (16, 16)) for k, key in zip("ab", keys)}
        >>> fn = lambda p, x: jnp.tanh(x @ p["a"] / 4) @ p["b"]
        >>> x = jax.random.normal(keys[2], (256, 16))
        >>> small = jc.compress(params, jc.quantize("int2"), uses=jc.uses(fn, params, x))
        >>> better = jc.learn_rounding(fn, params, small, [x], steps=100)
        >>> error = lambda p: jnp.linalg.norm(jc.lift(fn)(p, x) - fn(params, x))
        >>> bool(error(better) < 0.8 * error(small))
        True

    References:
        Nagel et al., 2020, Up or Down? Adaptive Rounding for Post-Training Quantization. Li et al.,
        2021, BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction.
    """
    given = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    chosen = _chosen(small, where)
    if not given or steps < 1:
        raise ValueError(f"{len(given)} batches and steps={steps}; at least 1 of each")
    dense = dict(named_leaves(params))
    sides = {path: _next_to(dense[path], leaf) for path, leaf in chosen.items()}
    near, far = ({path: side[i] for path, side in sides.items()} for i in range(2))
    ends = tuple({k: materialize(x) for k, x in side.items()} for side in (near, far))
    run = jax.jit(lift(fn))
    pairs = [(batch, run(params, *batch)) for batch in given]

    def error(tree: Any, batch: Any, want: Any) -> jax.Array:
        wide = lambda x: jnp.asarray(x, jnp.float32)
        got, want = (jax.tree.leaves(x) for x in (lift(fn)(tree, *batch), want))
        floats = [(wide(a), wide(b)) for a, b in zip(got, want, strict=True) if is_float(b)]
        return jnp.sum(jnp.stack([jnp.sum(jnp.square(a - b)) for a, b in floats]))

    measured = jax.jit(error)
    over_all = lambda tree: sum(float(measured(tree, *pair)) for pair in pairs)
    before = over_all(small)
    unit = max(before / len(pairs), float(jnp.finfo(jnp.float32).tiny))

    def loss(v: Any, at: jax.Array, tree: Any, ends: Any, batch: Any, want: Any) -> jax.Array:
        up, pull = jax.tree.map(between, v), pull_at(at)
        values = jax.tree.map(lambda h, a, b: a + (h * (b - a)).astype(a.dtype), up, *ends)
        total = sum(jnp.sum(pull(h)) for h in up.values()) / sum(h.size for h in up.values())
        soft = map_named(lambda path, x: values.get(path, x), tree)
        return error(soft, batch, want) / unit + _WEIGHT * total

    adam = optax.adam(rate)

    @jax.jit
    def step(v: Any, state: Any, *rest: Any) -> tuple[Any, Any]:
        updates, state = adam.update(jax.grad(loss)(v, *rest), state, v)
        return optax.apply_updates(v, updates), state

    v = {k: _start(dense[k], a, ends[1][k]) for k, a in ends[0].items()}
    state = adam.init(v)
    for i in range(steps):
        at = jnp.float32(i / steps)
        v, state = step(v, state, at, small, ends, *pairs[i % len(pairs)])
    codes = {k: _either(x, near[k], far[k], between(v[k]) >= 0.5) for k, x in chosen.items()}
    made = map_named(lambda path, x: codes.get(path, x), small)
    return made if over_all(made) < before else small


def _chosen(small: Any, where: Where) -> dict[str, QuantizedArray]:
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
            "learn_rounding takes leaves that are a QuantizedArray of integers with a code for each "
            f"entry; {met}: quantize them first, or leave them out by where="
        )
    return found


def _next_to(w: jax.Array, leaf: QuantizedArray) -> tuple[QuantizedArray, QuantizedArray]:
    """The nearest codes on the grid of a leaf, and those on the other side of the entries."""
    fmt, w = leaf.fmt, w.astype(jnp.float32)
    wide = lambda x: None if x is None else spread_to(x, leaf.cuts, leaf.shape)
    levels, _ = round_to_grid(w, wide(steps_of(leaf.scale)), wide(leaf.zero), fmt)
    near = leaf.replace(codes=encode(levels, fmt), block=None)
    side = jnp.sign(w - near.materialize().astype(jnp.float32))
    other = jnp.clip(levels + side, fmt.grid.low, fmt.grid.high)
    return near, near.replace(codes=encode(other, fmt))


def _start(w: jax.Array, near: jax.Array, far: jax.Array) -> jax.Array:
    """The soft choice that stands for the dense entries."""
    width = far.astype(jnp.float32) - near.astype(jnp.float32)
    share = (w.astype(jnp.float32) - near.astype(jnp.float32)) / jnp.where(width == 0, 1, width)
    return logit(jnp.clip(jnp.where(width == 0, 0, share), 0.01, 0.99))


def _either(leaf: QuantizedArray, near: Any, far: Any, up: jax.Array) -> QuantizedArray:
    codes = jnp.where(up, far.codes, near.codes)
    if leaf.block is None or leaf.axis is None:
        return leaf.replace(codes=codes)
    return leaf.replace(codes=pack(codes, leaf.bits, leaf.axis, leaf.block))
