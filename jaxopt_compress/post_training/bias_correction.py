"""Biases that make up for what compressed weights do to the means of outputs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import is_compressed, materialize
from jaxopt_compress.compression.matrices import matrices_of
from jaxopt_compress.lift import Statistics
from jaxopt_compress.rewriting.channels import Walk
from jaxopt_compress.rewriting.members import Group, beside
from jaxopt_compress.rewriting.report import check_results
from jaxopt_compress.rewriting.staging import shapes, stage
from jaxopt_compress.tree import Layout
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class CorrectedBiases(NamedTuple):
    """Compressed parameters with other biases.

    Attributes:
        params: The new parameters: those that were compressed, but for the biases.
        original: The dense parameters, of which the outputs' means are kept.
        shifts: Path of a bias -> what was added to it.
        skipped: Path of a compressed weight -> why no bias was corrected.
    """

    params: PyTree
    original: PyTree
    shifts: dict[str, jax.Array]
    skipped: dict[str, str]

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``fn`` itself: it takes the new parameters, lifted, as it took the old.

        Nothing is checked, since nothing in the function changes: only values of parameters did.
        For any other function than the one that was read the new values may be wrong; `check`
        compares results.
        """
        return fn

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the parameters, such as masks or moments: as it is."""
        return x

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, with the shifts taken back.

        Args:
            x: A tree of the structure of ``params``.
        """
        return self._shifted(x, -1)

    check = check_results

    def _shifted(self, x: PyTree, sign: int) -> PyTree:
        change = lambda path, b: (b + sign * self.shifts[path]).astype(b.dtype)
        leaves, treedef = jax.tree.flatten(x, is_leaf=is_compressed)
        names = [path for path, _ in named_leaves(x)]
        pairs = zip(names, leaves, strict=True)
        return treedef.unflatten([change(p, b) if p in self.shifts else b for p, b in pairs])


def correct_biases(
    fn: Callable[..., PyTree],
    params: PyTree,
    small: PyTree,
    *args: PyTree,
    stats: Mapping[str, Sequence[Statistics]],
    **kwargs: Any,
) -> CorrectedBiases:
    r"""Adds to biases what compressed weights take from the means of outputs.

    .. math:: b \leftarrow b - (\hat W - W)^T \, E[x]

    per channel, so that on the data of the statistics each product has the mean that it had. It
    takes any compression of the weights, and costs nothing when the function runs. Biases are found
    in the function: what is added to a product's result itself, one entry per channel. In scans
    over stacked layers each layer has a correction of its own.

    Args:
        fn: Any JAX function.
        params: Its dense parameters.
        small: What they were compressed to.
        *args: The other arguments of ``fn``; arrays may be `jax.ShapeDtypeStruct`.
        stats: Of `calibrate`, with `measures.means`.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The rewrite; in ``skipped`` the compressed weights without a bias that could be corrected,
        with the reason.

    Raises:
        ValueError: No bias can be corrected; says why for each weight. Or statistics have no
            means, or such that are infinite or NaN.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda p, x: jax.nn.relu(x) @ p["w"] + p["b"]
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> p = {"w": jax.random.normal(keys[0], (64, 8)), "b": jnp.zeros(8)}
        >>> x = jax.random.normal(keys[1], (256, 64))
        >>> small = jc.compress(p, jc.quantize("int3", where="w"), uses=jc.uses(fn, p, x))
        >>> rw = jc.correct_biases(fn, p, small, x, stats=jc.calibrate(fn, p, [x]))
        >>> mean = lambda params: jnp.abs((jc.lift(fn)(params, x) - fn(p, x)).mean(0)).max()
        >>> bool(mean(small) > 0.1), bool(mean(rw.params) < 1e-5)
        (True, True)

    References:
        Nagel et al., 2019, Data-Free Quantization Through Weight Equalization and Bias Correction.
    """
    names = [path for path, _ in named_leaves(params)]
    structs = jax.tree.leaves(shapes(params))
    staged = stage(fn, shapes(params), args, kwargs, forward=True)
    walk = Walk(staged, structs, names, scans=True)
    old, new = dict(named_leaves(params)), dict(named_leaves(small))
    writers = {names[group.writer.leaf]: group for group in walk.groups}
    shifts: dict[str, jax.Array] = {}
    skipped: dict[str, str] = {}
    for path in (path for path in names if is_compressed(new.get(path))):
        group = writers.get(path)
        why = "it is not the weight of a product that was found" if group is None else None
        why = _problem(walk, group, names, new) if group is not None else why
        if not stats.get(path):
            why = "there are no statistics of what meets it"
        if why is not None or group is None:
            skipped[path] = str(why)
            continue
        bias, w = group.direct[0], old[path]
        stats[path][0].check_finite(repr(path), "means")
        layers = tuple(w.shape[d] for d in group.writer.stack)
        shift = _shift(w, new[path], stats[path][0]).reshape(*layers, group.size)
        shifts[names[bias.leaf]] = beside(np.asarray(shift), bias, structs[bias.leaf].shape)
    if not shifts:
        raise ValueError(f"correct_biases found no bias to correct; skipped: {skipped}")
    rw = CorrectedBiases(small, params, shifts, skipped)
    return rw._replace(params=rw._shifted(small, 1))


def _problem(walk: Walk, group: Group, names: list[str], new: dict[str, Leaf]) -> str | None:
    """Why no bias can be corrected; None if one can."""
    if not group.biases:
        return "nothing is added to its result, one entry per channel"
    if not group.direct:
        path = names[group.biases[0].leaf]
        return (
            f"{path!r} is not added to its result itself: it is subtracted, or added to a function"
        )
    bias = group.direct[0]
    path = names[bias.leaf]
    for i, kind in ((group.writer.leaf, "it"), (bias.leaf, f"its bias {path!r}")):
        if len(walk.used[i]) > 1:
            return f"{kind} is used {len(walk.used[i])} times, also at {walk.used[i][1]}"
    if is_compressed(new[path]):
        return f"its bias {path!r} is compressed itself"
    layers = math.prod(new[path].shape[d] for d in bias.stack)
    whole = new[path].shape[bias.axis] == group.size and new[path].size == layers * group.size
    if bias.every != 1 or not whole or len(bias.stack) != len(group.writer.stack):
        return f"its bias {path!r} has not one entry per channel"
    return None


def _shift(w: Leaf, approximation: Leaf, stats: Statistics) -> jax.Array:
    """``-(approximation - w)^T E[x]``, one number per output channel of each layer."""
    contracting = stats.contracting
    output = tuple(d for d in range(-w.ndim, 0) if d not in contracting)
    matrices = matrices_of(tuple(w.shape), Layout(contracting, output), stats)
    wrong = materialize(approximation).astype(jnp.float32) - w.astype(jnp.float32)
    m = matrices.of(wrong)
    mean = jnp.broadcast_to(stats.mean, (*m.shape[:-2], stats.mean.shape[-1]))
    total = jnp.matmul(mean[..., None, :], m, precision=jax.lax.Precision.HIGHEST)
    return -total.reshape(-1)
