"""Scales moved between the channels of consecutive products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.rewriting.channels import Group, Member, Walk
from jaxopt_compress.rewriting.report import change_leaves, check_results
from jaxopt_compress.rewriting.staging import along, shapes, stage
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree, Value

_SWEEPS = 100
_SETTLED = 1e-3  # of log2 of the scales


class Equalized(NamedTuple):
    """Parameters whose channels have similar ranges; the function stays as it is.

    Attributes:
        params: The new parameters, ``original * factors`` for each path in ``factors``.
        original: The parameters before.
        factors: Path -> what the parameter was multiplied by; it broadcasts against it.
        skipped: Weight of a product -> why its output channels were not scaled.
    """

    params: PyTree
    original: PyTree
    factors: dict[str, jax.Array]
    skipped: dict[str, str]

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``fn`` itself: it takes the new parameters as it took the old.

        Nothing is checked, since nothing in the function changes: only values of parameters did.
        For any other function than the one that was read the new values may be wrong; `check`
        compares results.
        """
        return fn

    def tree(self, x: PyTree, *, power: int | None = None) -> PyTree:
        """A tree beside the original parameters for the new parameters.

        Args:
            x: A tree of the original structure; booleans, such as masks, and None stay.
            power: Multiplies numbers by ``factors ** power``: 1 for what is added to parameters or
                averages them, -1 for gradients and first moments, -2 for second moments.

        Returns:
            A tree of the same structure.

        Raises:
            ValueError: A leaf of numbers stands beside a parameter that changed, without ``power``.
        """

        def change(path: str, leaf: Leaf) -> Leaf:
            if leaf is None or path not in self.factors or jnp.asarray(leaf).dtype == bool:
                return leaf
            if power is None:
                raise ValueError(
                    f"{path!r} of shape {jnp.shape(leaf)} was changed by equalization: say how "
                    "numbers beside it scale, such as power=-1 for gradients"
                )
            return scaled_by(leaf, self.factors[path], power)

        return change_leaves(self.original, change, x)

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, with the original scales.

        Args:
            x: A tree of the structure of ``params``.

        Returns:
            A tree of the same structure.
        """

        def change(path: str, leaf: Leaf) -> Leaf:
            return leaf if path not in self.factors else scaled_by(leaf, self.factors[path], -1)

        return change_leaves(self.original, change, x)

    check = check_results


def equalize(
    fn: Callable[..., PyTree], params: PyTree, *args: PyTree, exact: bool = True, **kwargs: Any
) -> Equalized:
    """Scales channels between products, so that one scale fits a whole weight better.

    Channel ``c`` of a product's result is divided by ``s_c``, and the weights that read it are
    multiplied by ``s_c``. Biases, positively homogeneous functions such as relu and leaky relu,
    pooling, reshapes that flatten and depthwise convolutions may be in between, since
    ``relu(x / s) = relu(x) / s``. With ``r1``
    the largest magnitude in output channel ``c`` of the first weight and ``r2`` that in input
    channel ``c`` of the second,

        s_c = sqrt(r1_c r2_c) / r2_c

    gives both the same range (Nagel et al., 2019, "Data-Free Quantization Through Weight
    Equalization and Bias Correction"). It is repeated until the scales stay.

    Products are found in the function, not by modules or names. No data is needed. Products inside
    of scans and other control flow are not entered.

    Args:
        fn: Any JAX function.
        params: Its parameters.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        exact: Rounds scales to powers of two, so that the function's results keep every bit unless
            a number over- or underflows. False uses the scales of the formula.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The rewrite; in ``skipped`` all weights of products whose output channels were not scaled,
        with the reason.

    Raises:
        ValueError: No two products can be equalized; says why for each.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> def fn(p, x):
        ...     return jax.nn.relu(x @ p["w"]) @ p["v"]
        >>> p = {"w": jnp.array([[16.0, 1.0]]), "v": jnp.array([[1.0], [4.0]])}
        >>> rw = jc.equalize(fn, p, jnp.ones((1, 1)))
        >>> rw.params["w"].tolist(), rw.params["v"].tolist()
        ([[4.0, 2.0]], [[4.0], [2.0]])
        >>> rw.skipped["v"].split(" at ")[0]
        'its result is a result of the function'
    """
    leaves = jax.tree.leaves(params)
    names = [path for path, _ in named_leaves(params)]
    structs = jax.tree.leaves(shapes(params))
    walk = Walk(stage(fn, shapes(params), args, kwargs, forward=True), structs, names)
    skipped = {names[i]: why for i, why in walk.skipped.items()}
    for group in walk.groups:
        if group.reason:
            skipped.setdefault(names[group.writer[0]], group.reason)
    groups = [group for group in walk.groups if not group.reason]
    if not groups:
        raise ValueError(f"equalize found no two products to equalize; skipped: {skipped}")
    factors = _factors(groups, leaves, exact)
    new = [scaled_by(x, factors[i], 1) if i in factors else x for i, x in enumerate(leaves)]
    tree = jax.tree.structure(params).unflatten(new)
    return Equalized(tree, params, {names[i]: f for i, f in factors.items()}, skipped)


def _factors(groups: list[Group], leaves: list[Leaf], exact: bool) -> dict[int, jax.Array]:
    """What each parameter is multiplied by, by its number."""
    factors: dict[int, jax.Array] = {}
    for group in groups:
        for leaf, *_ in (group.writer, *group.biases, *group.readers):
            factors[leaf] = jnp.ones((1,) * leaves[leaf].ndim)
    for _ in range(_SWEEPS):
        largest = 0.0
        for group in groups:
            first = _ranges(leaves, factors, group.writer, group.size)
            read = [_ranges(leaves, factors, x, group.size) for x in group.readers]
            second = jnp.stack(read).max(0)
            # The logarithms' difference, since the ranges' ratio may overflow.
            log = (jnp.log2(first) - jnp.log2(second)) / 2
            log = jnp.where(jnp.isfinite(log), log, 0)
            log = jnp.round(log) if exact else log
            scale = jnp.ldexp(1.0, log.astype(int)) if exact else jnp.exp2(log)
            for members, s in (((group.writer, *group.biases), 1 / scale), (group.readers, scale)):
                for leaf, axis, every, _ in members:
                    times = leaves[leaf].shape[axis] // (group.size * every)
                    full = jnp.tile(jnp.repeat(s, every), times)
                    factors[leaf] = factors[leaf] * along(full, axis, leaves[leaf].ndim)
            largest = max(largest, float(jnp.abs(log).max()))
        if largest < _SETTLED:
            break
    return factors


def _ranges(
    leaves: list[Leaf], factors: dict[int, jax.Array], member: Member, size: int
) -> jax.Array:
    """The largest magnitude in each channel."""
    leaf, axis, every, _ = member
    scaled = jnp.abs(leaves[leaf].astype(jnp.float32) * factors[leaf])
    largest = scaled.max([i for i in range(scaled.ndim) if i != axis])
    return largest.reshape(-1, size, every).max((0, 2))


def scaled_by(x: Value, factor: jax.Array, power: int) -> jax.Array:
    """A parameter times a power of factors, in its own dtype."""
    x = jnp.asarray(x)
    return (x * factor**power).astype(x.dtype)
