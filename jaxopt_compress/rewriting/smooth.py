"""Ranges of activations moved to the weights that read them, by what produces them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.lift import Statistics
from jaxopt_compress.rewriting.channels import Walk
from jaxopt_compress.rewriting.equalize import Equalized, scaled_by
from jaxopt_compress.rewriting.members import Group, Member, beside, of_channels
from jaxopt_compress.rewriting.staging import shapes, stage
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


def smooth(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    stats: Mapping[str, Sequence[Statistics]],
    alpha: float = 0.5,
    exact: bool = True,
    **kwargs: Any,
) -> Equalized:
    r"""Moves the ranges of outlying activations to weights, at no cost when the function runs.

    Channels that a norm's parameter scales, or that are the result of a product, are divided by

    .. math:: s_i = \max |x_i|^\alpha / \max_W \max |W_i|^{1 - \alpha}

    and the weights that read them are multiplied by it; all weights that read the same activation
    have the same :math:`s`. It is `smooth_quant` without factors at run time, for channels that can
    be scaled: as in `fold_scales`, also inside of scans over stacked layers. Compress the result by
    ``quantize("int8", activations="int8")``.

    Args:
        fn: Any JAX function.
        params: Its parameters, dense.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        stats: Of `calibrate`, with `measures.ranges`. Those of the new function are others.
        alpha: How much of the range of activations is moved to weights, from 0 to 1.
        exact: Rounds scales to powers of two, so that the function's results keep every bit unless
            a number over- or underflows. False uses the scales of the formula.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The rewrite, as of `equalize`; ``skipped`` names the weights whose inputs keep their ranges.

    Raises:
        ValueError: ``alpha`` is out of range; or no channels can be scaled; says why for each.
            Or ranges are infinite or NaN.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda p, x: (x / jnp.abs(x).max(-1, keepdims=True) * p["scale"]) @ p["w"]
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> p = {"scale": jnp.where(jnp.arange(64) < 2, 50.0, 1.0)}
        >>> p["w"] = jax.random.normal(keys[0], (64, 8))
        >>> x = jax.random.normal(keys[1], (32, 64))
        >>> rw = jc.smooth(fn, p, x, stats=jc.calibrate(fn, p, [x]))
        >>> rw.check(fn, x).absolute
        0.0
        >>> c, uses = jc.quantize("int8", where="w", activations="int8"), jc.uses(fn, p, x)
        >>> run = lambda p: jc.lift(fn)(jc.compress(p, c, uses=uses), x)
        >>> error = lambda p: float(jnp.abs(run(p) - fn(p, x)).mean())
        >>> error(rw.params) < 0.5 * error(p)
        True

    References:
        Xiao et al., 2023, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
        Language Models.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it lies between 0 and 1")
    names = [path for path, _ in named_leaves(params)]
    leaves, treedef = jax.tree.flatten(params)
    walk = Walk(
        stage(fn, shapes(params), args, kwargs, forward=True),
        jax.tree.leaves(shapes(params)),
        names,
        scans=True,
        scales=True,
    )
    skipped = {names[i]: met for i, met in walk.met.items() if isinstance(met, str)}
    factors: dict[int, jax.Array] = {}
    for group in walk.groups:
        readers = [names[m.leaf] for m in group.readers]
        unknown = [path for path in readers if not stats.get(path)]
        why = group.reason
        if unknown:
            why = why or f"there are no statistics of what meets {unknown[0]!r}"
        if why:
            skipped.update(dict.fromkeys(readers, why))
            continue
        seen = [stats[path][0] for path in readers]
        for path, own in zip(readers, seen, strict=True):
            own.check_finite(repr(path), "ranges")
        s = _scales(group, leaves, seen, alpha, exact)
        writers = [(m, 1 / s) for m in (group.writer, *group.biases)]
        for member, by in (*writers, *((m, s) for m in group.readers)):
            i = member.leaf
            own = beside(by, member, leaves[i].shape)
            leaves[i] = scaled_by(leaves[i], own, 1)
            factors[i] = factors[i] * own if i in factors else own
    if not factors:
        raise ValueError(f"smooth found no channels to scale; skipped: {skipped}")
    by_path = {names[i]: f for i, f in factors.items()}
    return Equalized(treedef.unflatten(leaves), params, by_path, skipped)


def _scales(
    group: Group, leaves: list[Leaf], seen: list[Statistics], alpha: float, exact: bool
) -> np.ndarray:
    """The scales of a group's channels, ``[*stack, size]``."""
    own = [_largest(jnp.abs(leaves[m.leaf].astype(jnp.float32)), m, group) for m in group.readers]
    met = [
        _largest(_as_weight(s, leaves[m.leaf].shape), m, group)
        for s, m in zip(seen, group.readers, strict=True)
    ]
    reach, weight = np.max(met, 0), np.max(own, 0)
    # Inputs and weights that are 0 have no range to share.
    known = (reach > 0) & (weight > 0)
    log = alpha * np.log2(reach, where=known, out=np.zeros_like(reach))
    log -= (1 - alpha) * np.log2(weight, where=known, out=np.zeros_like(reach))
    return np.exp2(np.clip(np.round(log) if exact else log, -60, 60)).astype(np.float32)


def _as_weight(stats: Statistics, shape: tuple[int, ...]) -> jax.Array:
    """Largest magnitudes of inputs, of the rank of the weight that they meet."""
    reach, rank = stats.absmax, len(shape)
    lead, at = stats.rows.ndim, sorted(d + rank for d in stats.contracting)
    sizes = [n if d in at else 1 for d, n in enumerate(shape)]
    if lead and reach.shape[:-1] == shape[:lead]:
        sizes[:lead] = shape[:lead]
    elif lead:
        reach = reach.max(tuple(range(lead)))
    if math.prod(sizes) != reach.size:
        reach = jnp.max(reach)  # Groups of channels: one range for all of them.
        sizes = [1] * rank
    return reach.reshape(sizes)


def _largest(x: jax.Array, member: Member, group: Group) -> np.ndarray:
    """The largest entry of each channel, ``[*stack, size]``."""
    kept = (*member.stack, member.axis)
    x = x.max([d for d in range(x.ndim) if d not in kept], keepdims=True)
    return of_channels(np.asarray(x), member, group.size, x.shape).max((-3, -1))
