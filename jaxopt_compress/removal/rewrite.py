"""Smaller parameters, and functions that take them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.analysis import (
    Analysis,
    Frame,
    analyze,
    emptied,
    named_inputs,
    seeds_of,
    type_of,
)
from jaxopt_compress.rewriting.coupling.coupling import NotRemovable
from jaxopt_compress.rewriting.coupling.exactness import fills_of, operands_of
from jaxopt_compress.rewriting.coupling.graph import Axes
from jaxopt_compress.rewriting.coupling.lanes import Lanes
from jaxopt_compress.rewriting.coupling.replay import Gone, Kept, cut, run
from jaxopt_compress.rewriting.coupling.skips import filled, kept_without, numbers
from jaxopt_compress.rewriting.report import Difference, difference
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree, Value


class Removed(NamedTuple):
    """Parameters without the removed units, and functions rewritten to take them.

    Attributes:
        params: The new parameters.
        shapes: The types of the parameters before.
        gone: Path -> per axis, booleans, true where an index went; of parameters that shrank.
        inputs: Name -> likewise, of inputs that are passed without the removed indices.
        frame: What the groups were found with.
        skip: Whether the reference skips units where a maximum chooses.
    """

    params: PyTree
    shapes: PyTree
    gone: dict[str, Gone]
    inputs: dict[str, Gone]
    frame: Frame
    skip: bool = False

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``g`` with ``g(rewrite.params, *args)`` equal to ``fn`` of the masked parameters.

        Args:
            fn: Any function of the original parameters.

        Returns:
            A function of the new parameters. It stages ``fn`` whenever it is called, so put it
            under `jax.jit`. It raises a `NotRemovable` if ``fn`` couples the removed indices with
            others, or a ValueError for parameters of other shapes.
        """

        def removed(params: PyTree, *args: PyTree, **kwargs: Any) -> PyTree:
            leaves = self._leaves(params)
            found, kept = self._analyze(fn, leaves, args, kwargs)
            whole = emptied(self.gone)
            for (path, axes), leaf in zip(found.params.items(), leaves, strict=True):
                left = _left(self.gone[path]) if path in whole else kept.shape(axes)
                _check_left(path, leaf, axes, left, "the parameters of this rewrite")
            for (name, axes), value in zip(found.inputs.items(), found.values, strict=True):
                left = kept.shape(axes)
                _check_left(name, value, axes, left, "what argument() of this rewrite returns")
            results = run(found.body, kept, [*leaves, *found.values])
            return found.out_tree.unflatten(results)

        return removed

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the original parameters, such as moments or masks, for the new ones.

        Args:
            x: A tree of their structure; leaves may be None.

        Raises:
            ValueError: A leaf has another shape than its parameter had.
        """
        return self._map(self._cut, x)

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, with zeros where indices were removed.

        Args:
            x: A tree of the structure of ``params``.

        Returns:
            Parameters of the original shapes: the masked ones.
        """
        return self._map(self._expand, x)

    def argument(self, key: int | str, x: PyTree) -> PyTree:
        """An argument that follows, such as a cache, without the removed indices.

        Args:
            key: The number of the argument after the parameters, or its keyword.
            x: The argument, whole.
        """
        prefix = f"in/{key}"

        def smaller(path: str, leaf: Leaf) -> Leaf:
            flags = self.inputs.get(f"{prefix}/{path}".rstrip("/"))
            return leaf if flags is None else cut(leaf, flags)

        return map_named(smaller, x)

    def check(
        self,
        fn: Callable[..., PyTree],
        *args: PyTree,
        tolerance: float | None = None,
        **kwargs: Any,
    ) -> Difference:
        """Measures the rewritten function against ``fn`` of the masked parameters.

        Args:
            fn: A function of the original parameters.
            *args: Its other arguments, whole.
            tolerance: The largest relative difference that does not raise; None never raises.
            **kwargs: Further arguments.

        Returns:
            The largest absolute and relative difference.
        """
        masked = self.undo(self.params)
        found, kept = self._analyze(fn, self._leaves(self.params), args, kwargs)
        axes = [*found.params.values(), *found.inputs.values()]
        got = run(
            found.body, kept, list(map(kept.cut, [*jax.tree.leaves(masked), *found.values], axes))
        )
        if self.skip:
            reference = self._skipping(found, kept, [*jax.tree.leaves(masked), *found.values])
        else:
            reference = jax.tree.leaves(fn(masked, *args, **kwargs))
        return difference(got, list(map(kept.cut, reference, found.outputs.values())), tolerance)

    def _skipping(self, found: Analysis, kept: Kept, values: list[Value]) -> list[Value]:
        """The masked function with -inf at removed units where a maximum chooses."""
        whole = Kept(found.coupling, np.zeros(found.coupling.count, bool))
        given = numbers(found, emptied(self.gone))
        fills = fills_of(found.body, kept, self._masked(found), given)
        whole.skips = filled(found.body, kept, fills)
        return run(found.body, whole, values)

    def _masked(self, found: Analysis) -> list[bool]:
        own = [is_float(t) for t in jax.tree.leaves(self.shapes)]
        return own + [False] * (len(found.body.ins) - len(own))

    def _analyze(
        self, fn: Callable[..., PyTree], leaves: list[Leaf], args: tuple, kwargs: dict[str, PyTree]
    ) -> tuple[Analysis, Kept]:
        """The equations of a call, and what is left of them."""
        shapes = {name: jnp.shape(x) for name, x in named_inputs(args, kwargs).items()}
        sizes = {
            name: _whole(shapes[name], flags)
            for name, flags in self.inputs.items()
            if name in shapes and len(shapes[name]) == len(flags)
        }
        own = [
            type_of(x, t.shape) for x, t in zip(leaves, jax.tree.leaves(self.shapes), strict=True)
        ]
        params = jax.tree.structure(self.shapes).unflatten(own)
        found = analyze(fn, params, args, kwargs, self.frame, sizes)
        whole = emptied(self.gone)
        kept = kept_without(found, seeds_of(found, self.gone), whole)
        for path, axes in ((p, a) for p, a in found.params.items() if p not in whole):
            wanted = self.gone.get(path, tuple(np.zeros(len(a), bool) for a in axes))
            for k, (own, flags) in enumerate(zip(kept.gone(axes), wanted, strict=True)):
                more = np.flatnonzero(own & ~flags)
                if len(more):
                    raise NotRemovable(
                        f"this function couples the removed indices with {more[:8].tolist()} of "
                        f"axis {k} of {path!r}, which are to stay: find groups on this function"
                    )
        given = self._masked(found), numbers(found, whole), self.skip
        kept.lanes = Lanes(kept, operands_of(found.body, kept, *given))
        return found, kept

    def _leaves(self, params: PyTree) -> list[Leaf]:
        return jax.tree.structure(self.shapes).flatten_up_to(params)

    def _map(self, fn: Callable[[str, Leaf, Leaf], Leaf], x: PyTree) -> PyTree:
        leaves = self._leaves(x)
        pairs = zip(named_leaves(self.shapes), leaves, strict=True)
        new = [leaf if leaf is None else fn(path, leaf, t) for (path, t), leaf in pairs]
        return jax.tree.structure(self.shapes).unflatten(new)

    def _cut(self, path: str, x: Leaf, whole: Leaf) -> Leaf:
        _check_shape(path, x, whole.shape)
        return cut(x, self.gone[path]) if path in self.gone else x

    def _expand(self, path: str, x: Leaf, whole: Leaf) -> Leaf:
        flags = self.gone.get(path)
        if flags is None:
            return x
        _check_shape(path, x, _left(flags))
        x = jnp.asarray(x)
        if 0 in x.shape:
            return jnp.zeros(whole.shape, x.dtype)
        for k, own in enumerate(flags):
            if own.any():
                # Past the end, where there is nothing but zeros.
                at = (slice(None),) * k + (np.where(own, len(own), np.cumsum(~own) - 1),)
                named = {"out_sharding": _compat.explicit_sharding(x)}
                x = x.at[at].get(mode="fill", fill_value=0, **named)
        return x


def _left(flags: Gone) -> tuple[int, ...]:
    """The shape that is left of a parameter."""
    return tuple(int((~f).sum()) for f in flags)


def _whole(shape: tuple[int, ...], flags: Gone) -> tuple[int, ...]:
    """The shape of an input before indices were removed; it may have been passed whole too."""
    left = lambda f: int((~f).sum())
    return tuple(len(f) if n == left(f) else n for n, f in zip(shape, flags, strict=True))


def _check_left(name: str, x: Leaf, axes: Axes, left: tuple[int, ...], what: str) -> None:
    """Refuses a parameter or an input that has not the shape that is left of it."""
    if jnp.shape(x) != left:
        raise ValueError(
            f"{name!r} has shape {jnp.shape(x)}, and {left} are left of "
            f"{tuple(map(len, axes))}: pass {what}"
        )


def _check_shape(path: str, x: Leaf, expected: tuple[int, ...]) -> None:
    if jnp.shape(x) != tuple(expected):
        raise ValueError(
            f"what stands beside {path!r} has shape {jnp.shape(x)}, and not {tuple(expected)}"
        )
