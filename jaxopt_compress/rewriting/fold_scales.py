"""Factors that stand beside compressed weights, folded into what produces their inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import ScaledArray, is_compressed
from jaxopt_compress.lift import lift
from jaxopt_compress.lift.views import NoView, rescaled
from jaxopt_compress.rewriting.channels import Walk
from jaxopt_compress.rewriting.members import Group, Member, beside, of_channels
from jaxopt_compress.rewriting.report import Difference, difference
from jaxopt_compress.rewriting.staging import stage
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree

_ROUNDING = 1e-6  # Factors that differ by less are the same.


class FoldedScales(NamedTuple):
    """Compressed parameters without factors of their own; the function stays as it is.

    Attributes:
        params: The new parameters.
        original: The parameters before.
        factors: Path -> what the parameter was multiplied by; it broadcasts against it.
        folded: Path of a weight that had factors -> the parameter that holds them now.
        skipped: Path of a weight that keeps its factors -> why.
    """

    params: PyTree
    original: PyTree
    factors: dict[str, jax.Array]
    folded: dict[str, str]
    skipped: dict[str, str]

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``fn`` itself: lifted, it takes the new parameters as it took the old.

        Nothing is checked, since nothing in the function changes: only values of parameters did.
        For any other function than the one that was read the new values may be wrong; `check`
        compares results.
        """
        return fn

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the original parameters for the new parameters.

        Args:
            x: A tree of one leaf per parameter; booleans, such as masks, and None stay.

        Raises:
            ValueError: A leaf of numbers stands beside a parameter that changed.
        """

        def change(path: str, leaf: Leaf) -> Leaf:
            if path not in self.factors or leaf is None or jnp.asarray(leaf).dtype == bool:
                return leaf
            raise ValueError(
                f"{path!r} of shape {jnp.shape(leaf)} was changed by folding scales: numbers "
                "beside it have no meaning for the new parameter; compute them anew"
            )

        return self._map(change, x)

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, with the factors beside the weights again.

        Args:
            x: A tree of the structure of ``params``.
        """
        old = dict(named_leaves(self.original))

        def back(path: str, leaf: Leaf) -> Leaf:
            if path in self.factors:
                leaf = _times(leaf, 1 / self.factors[path])
            return ScaledArray(leaf, old[path].factors) if path in self.folded else leaf

        return self._map(back, x)

    def check(
        self,
        fn: Callable[..., PyTree],
        *args: PyTree,
        tolerance: float | None = None,
        **kwargs: Any,
    ) -> Difference:
        """Measures ``lift(fn)`` of the new parameters against that of the original ones.

        Args:
            fn: A function of the parameters.
            *args: Its other arguments.
            tolerance: The largest relative difference that does not raise; None never raises.
            **kwargs: Further arguments.

        Returns:
            The largest absolute and relative difference.
        """
        run = jax.jit(lift(fn))
        got = run(self.params, *args, **kwargs)
        return difference(got, run(self.original, *args, **kwargs), tolerance)

    def _map(self, change: Callable[[str, Leaf], Leaf], x: PyTree) -> PyTree:
        treedef = jax.tree.structure(self.original, is_leaf=is_compressed)
        names = [path for path, _ in named_leaves(self.original)]
        pairs = zip(names, treedef.flatten_up_to(x), strict=True)
        return treedef.unflatten([change(path, leaf) for path, leaf in pairs])


def fold_scales(
    fn: Callable[..., PyTree], small: PyTree, *args: PyTree, **kwargs: Any
) -> FoldedScales:
    r"""Folds the factors of `awq` and `smooth_quant` into what produces the activations.

    A `ScaledArray` multiplies the activation by factors whenever it is used. Where the activation
    is scaled by a norm's parameter or is the result of a product, they are folded there:

    .. math:: (x \circ g + b) \, \mathrm{diag}(f) W = (x \circ g f + b f) \, W

    Biases, products with values that do not depend on the channel, gates, and positively
    homogeneous functions such as relu may be in between, as in `equalize`, also inside of scans
    over stacked layers. Weights that read the same activation have to agree: all have the same
    factors, or are dense and are divided by them. ``awq(alpha=)`` and `smooth` give such factors.
    The function stays as it is, up to the rounding of the parameters that changed.

    Args:
        fn: Any JAX function.
        small: Its parameters, some of them in a `ScaledArray`.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The rewrite; ``folded`` and ``skipped`` name each weight that had factors.

    Raises:
        ValueError: There is no `ScaledArray`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> p = {"up": jax.random.normal(keys[0], (4, 8)), "bias": jnp.ones(8)}
        >>> p["down"] = jax.random.normal(keys[1], (8, 2))
        >>> x = jax.random.normal(keys[2], (32, 4))
        >>> c, stats = jc.awq("int4", where="down"), jc.calibrate(fn, p, [x])
        >>> small = jc.compress(p, c, uses=jc.uses(fn, p, x), stats=stats)
        >>> rw = jc.fold_scales(fn, small, x)
        >>> rw.folded, type(rw.params["down"]).__name__
        ({'down': 'up'}, 'QuantizedArray')
        >>> bool(rw.check(fn, x).relative < 1e-6)
        True

    References:
        Xiao et al., 2023, SmoothQuant. Lin et al., 2024, AWQ.
    """
    named = named_leaves(small)
    names, leaves = [path for path, _ in named], [leaf for _, leaf in named]
    if not any(isinstance(leaf, ScaledArray) for leaf in leaves):
        raise ValueError("fold_scales found no ScaledArray, which awq and smooth_quant make")
    structs = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x.dtype)) for x in leaves]
    treedef = jax.tree.structure(small, is_leaf=is_compressed)
    staged = stage(fn, treedef.unflatten(structs), args, kwargs, forward=True)
    walk = Walk(staged, structs, names, scans=True, scales=True)
    factors: dict[str, jax.Array] = {}
    folded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    new = dict(named)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, ScaledArray):
            met = walk.met.get(i, "it is not the plain weight of a product")
            skipped[names[i]] = met if isinstance(met, str) else walk.groups[met].reason or ""
    for group in walk.groups:
        scaled = [names[m.leaf] for m in group.readers if isinstance(leaves[m.leaf], ScaledArray)]
        if group.reason or not scaled:
            continue
        try:
            changed, own = _folded(group, leaves, names, new)
        except _Kept as kept:
            skipped.update(dict.fromkeys(scaled, str(kept)))
            continue
        new |= changed
        factors |= own
        for path in scaled:
            folded[path] = names[group.writer.leaf]
            del skipped[path]
    return FoldedScales(treedef.unflatten(new.values()), small, factors, folded, skipped)


class _Kept(Exception):
    """Factors stay beside their weights; says why."""


def _folded(
    group: Group, leaves: list[Leaf], names: list[str], new: dict[str, Leaf]
) -> tuple[dict[str, Leaf], dict[str, jax.Array]]:
    """The changed leaves of a group, and what each of them was multiplied by."""
    own = {}
    for member in group.readers:
        leaf, path = leaves[member.leaf], names[member.leaf]
        if isinstance(leaf, ScaledArray):
            own[path] = _per_channel(leaf, member, group.size, path)
        elif is_compressed(leaf):
            raise _Kept(f"{path!r} reads the same activation and has no factors")
    (first, f), *others = own.items()
    for path, other in others:
        if f.shape != other.shape or not np.allclose(f, other, rtol=_ROUNDING, atol=0):
            raise _Kept(
                f"{first!r} and {path!r} read the same activation and have different factors"
            )
    changed, factors = {}, {}
    for member, by in (
        *((m, f) for m in (group.writer, *group.biases)),
        *((m, 1 / f) for m in group.readers if names[m.leaf] not in own),
    ):
        path = names[member.leaf]
        factors[path] = beside(by, member, leaves[member.leaf].shape)
        try:
            changed[path] = _times(new[path], factors[path])
        except NoView:
            raise _Kept(f"the stored form of {path!r} takes no factors per channel") from None
    changed |= {path: new[path].array for path in own}
    return changed, factors


def _per_channel(w: ScaledArray, member: Member, size: int, path: str) -> np.ndarray:
    """The factors of each layer's channels, ``[*stack, size]``.

    Raises:
        _Kept: They differ along other axes.
    """
    f = np.asarray(w.factors)
    kept = (*member.stack, member.axis)
    if any(n > 1 for d, n in enumerate(f.shape) if d not in kept):
        raise _Kept(f"the factors of {path!r} differ along other axes than its channels")
    f = of_channels(f, member, size, w.shape)
    one = f[..., :1, :, :1]
    if not np.allclose(f, one, rtol=_ROUNDING, atol=0):
        raise _Kept(f"the factors of {path!r} differ among entries of one channel")
    return one[..., 0, :, 0]


def _times(w: Leaf, factors: jax.Array) -> Leaf:
    if is_compressed(w):
        return rescaled(w, factors)
    w = jnp.asarray(w)
    return (w * factors).astype(w.dtype)
