"""Streams rotated by weights alone: what writes them, what reads them and the norms between."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.numerics.hadamard import rotated
from jaxopt_compress.rewriting.report import change_leaves, check_results
from jaxopt_compress.rewriting.rotatable import Rotatable
from jaxopt_compress.rewriting.staging import Staged, along, run_step, shapes, stage, value_of
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class Rotated(NamedTuple):
    """Parameters whose streams are rotated, and functions that take them.

    Attributes:
        params: The new parameters.
        original: The parameters before.
        axes: Path -> the axis along which it was rotated -> the number of the rotation.
        turns: The matrix of each rotation: the signs of a Hadamard matrix, int8 ``[n]``, or the
            matrix itself, orthogonal, ``[n, n]``.
        scales: Path of a weight -> the parameter that multiplied its input, which is 1 now.
        turned: Parameters that are multiplied in the original basis, at run time.
        skipped: Path -> why its channels were not rotated.
    """

    params: PyTree
    original: PyTree
    axes: dict[str, dict[int, int]]
    turns: tuple[jax.Array, ...]
    scales: dict[str, tuple[int, str]]
    turned: frozenset[str]
    skipped: dict[str, str]

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``g`` with ``g(rewrite.params, *args)`` equal to ``fn(params, *args)``.

        Args:
            fn: Any function of the original parameters that has the same streams.

        Returns:
            ``fn`` itself, unless some parameter is multiplied in the original basis.
        """
        if not self.turned:
            return fn

        def turning(params: PyTree, *args: PyTree, **kwargs: Any) -> PyTree:
            staged = stage(fn, shapes(self.original), args, kwargs)
            found = Rotatable(staged, self.original, self.turned, self._odd())
            if found.axes != self.axes:
                raise ValueError(
                    "this function has other streams than the one that was rotated; rotated were "
                    f"{sorted(self.axes)}, here can be {sorted(found.axes)}: {found.skipped}"
                )
            return self._replay(staged, found, params)

        return turning

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the original parameters for the new ones.

        Args:
            x: A tree of the original structure; leaves beside parameters that did not change.

        Raises:
            ValueError: A leaf stands beside a parameter that changed: norms' scales are folded,
                so that neither masks nor moments keep a meaning.
        """

        def change(path: str, leaf: Leaf) -> Leaf:
            if path not in self.axes and path not in self._folded():
                return leaf
            raise ValueError(
                f"{path!r} of shape {jnp.shape(leaf)} was changed by a rotation: what stands "
                "beside it has no meaning for the new parameter; compute it anew"
            )

        return self._map(change, x)

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, for the original function.

        Args:
            x: A tree of the structure of ``params``, dense.

        Returns:
            A tree of the original structure. A scale that was folded keeps its original value times
            the new one, as far as it is the same for all weights that it was folded into.
        """
        old = dict(named_leaves(self.original))
        new = dict(zip(old, jax.tree.structure(self.original).flatten_up_to(x), strict=True))

        def change(path: str, leaf: Leaf) -> Leaf:
            for axis, group in self.axes.get(path, {}).items():
                leaf = _turned(leaf, self.turns[group], axis, inverse=True)
            if path in self.scales:
                axis, scale = self.scales[path]
                leaf = _scaled(leaf, axis, old[scale], -1)
            if path in self._folded():
                leaf = (old[path] * leaf).astype(leaf.dtype)
            return leaf

        return self._map(lambda path, _: change(path, jnp.asarray(new[path])), x)

    check = check_results

    def _odd(self) -> bool:
        return any(turn.ndim > 1 for turn in self.turns)

    def _folded(self) -> set[str]:
        return {scale for _, scale in self.scales.values()}

    def _map(self, change: Callable[[str, Leaf], Leaf], x: PyTree) -> PyTree:
        changed = {*self.axes, *self._folded()}

        def change_own(path: str, leaf: Leaf) -> Leaf:
            return leaf if leaf is None or path not in changed else change(path, leaf)

        return change_leaves(self.original, change_own, x)

    def _replay(self, staged: Staged, found: Rotatable, params: PyTree) -> PyTree:
        leaves = jax.tree.structure(self.original).flatten_up_to(params)
        env = {**staged.constants, **dict(enumerate(leaves))}
        env.update(enumerate(staged.arguments, staged.leaves))
        for n, step in enumerate(staged.steps):
            turn = found.turns.get(n)
            if turn is None:
                run_step(env, step)
                continue
            values = [value_of(env, i) for i in step.inputs]
            k, by = found.streams_of(n), self.turns[turn.group]
            values[k] = _turned(values[k], by, turn.axis, inverse=True)
            y = (values[0] * values[1]).astype(step.out.dtype)
            env[step.outputs[0]] = _turned(y, by, turn.axis)
        return staged.out_tree.unflatten([value_of(env, i) for i in staged.outputs])


def rotate(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    key: jax.Array | None = None,
    **kwargs: Any,
) -> Rotated:
    r"""Rotates streams of channels, such as the residual stream, at no cost when the function runs.

    Weights that write a stream are multiplied by :math:`R = \mathrm{diag}(s) H` from the right, and
    those that read it by :math:`R^T` from the left, with random signs and a Hadamard matrix. Sums
    of streams, and norms by the root of the mean square, give the same in any basis; their scales
    are folded into the weights that read them first, and become 1. Outliers are spread over all
    channels, so that weights and activations fit their grids better.

    Streams are found in the function, also in scans, not by modules or names. A scale that cannot
    be folded, such as that of the last norm where the embedding is the last layer too, is applied
    in the original basis, in :math:`O(n \log n)`. Layer norms that subtract a mean depend on the
    basis, and their streams stay as they are.
    `rotate_inputs` rotates what meets any weight, at run time.

    Args:
        fn: Any JAX function.
        params: Its parameters.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        key: The random key of the signs; by default ``jax.random.key(0)``.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The rewrite: ``params``, ``function(f)``, ``tree(x)``, ``undo(x)``, ``check(f, ...)``; in
        ``skipped`` the parameters whose channels were not rotated, with the reason.

    Raises:
        ValueError: No stream can be rotated; says why for each parameter.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> def fn(p, ids):
        ...     x = p["table"][ids]
        ...     normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True)) * p["scale"]
        ...     return jax.nn.relu(normed @ p["up"]) @ p["down"]
        >>> keys, ids = jax.random.split(jax.random.key(0), 3), jnp.arange(5)
        >>> p = {"table": jax.random.normal(keys[0], (5, 64)), "scale": jnp.arange(1.0, 65)}
        >>> p |= {"up": jax.random.normal(keys[1], (64, 8)), "down": jnp.ones((8, 2))}
        >>> rw = jc.rotate(fn, p, ids)
        >>> sorted(rw.axes), rw.function(fn) is fn, bool((rw.params["scale"] == 1).all())
        (['table', 'up'], True, True)
        >>> bool(rw.check(fn, ids).relative < 1e-5)
        True

    References:
        Ashkboos et al., 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.
        Ashkboos et al., 2024, SliceGPT: Compress Large Language Models by Deleting Rows
        and Columns.
    """
    key = jax.random.key(0) if key is None else key

    def signs(found: Rotatable) -> tuple[jax.Array, ...]:
        draw = lambda i, n: jax.random.rademacher(jax.random.fold_in(key, i), (n,), jnp.int8)
        return tuple(draw(i, n) for i, n in enumerate(found.sizes))

    return rotated_by(signs, fn, params, args, kwargs, odd=False)


def rotated_by(
    turns: Callable[[Rotatable], tuple[jax.Array, ...]],
    fn: Callable[..., PyTree],
    params: PyTree,
    args: tuple,
    kwargs: dict[str, Any],
    odd: bool = True,
) -> Rotated:
    """Rotates streams by matrices that are made when the streams are known.

    Args:
        turns: From what was found to the matrix of each stream, as in `Rotated`.
        fn: As in `rotate`, like the rest.
        params: Likewise.
        args: Likewise.
        kwargs: Likewise.
        odd: Whether streams may have an odd number of channels.

    Raises:
        ValueError: No stream can be rotated; says why for each parameter.
    """
    staged, turned = stage(fn, shapes(params), args, kwargs), frozenset[str]()
    names = [path for path, _ in named_leaves(params)]
    while True:
        found = Rotatable(staged, params, turned, odd)
        more = {names[i] for i, able in found.conflicts.items() if able} - turned
        if not more:
            break
        turned |= more
    if found.conflicts or not found.axes:
        lost = [names[i] for i in found.conflicts]
        why = f"; scales that cannot be folded: {lost}" if lost else ""
        raise ValueError(f"there is no stream to rotate; skipped: {found.skipped}{why}")
    rw = Rotated(params, params, found.axes, turns(found), found.scales, turned, found.skipped)
    return rw._replace(params=_rotated(rw))


def _turned(x: jax.Array, turn: jax.Array, axis: int, inverse: bool = False) -> jax.Array:
    """``x`` times a rotation along one axis, or times its inverse."""
    if turn.ndim == 1:
        return rotated(x, along(turn, axis, x.ndim), [axis], inverse=inverse)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    how = (((axis,), (1 if inverse else 0,)), ((), ()))
    y = jax.lax.dot_general(x.astype(wide), turn.astype(wide), how, jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


def _rotated(rw: Rotated) -> PyTree:
    """The new parameters."""
    old = dict(named_leaves(rw.original))

    def change(path: str, leaf: Leaf) -> Leaf:
        if path not in rw.axes:
            return jnp.ones_like(leaf)
        new = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        if path in rw.scales:
            axis, scale = rw.scales[path]
            new = _scaled(new, axis, old[scale], 1)
        for axis, group in rw.axes[path].items():
            new = _turned(new, rw.turns[group], axis)
        return new.astype(leaf.dtype)

    return rw._map(change, rw.original)


def _scaled(w: Leaf, axis: int, scale: Leaf, power: int) -> jax.Array:
    """A weight times a scale along an axis, and along the stacks that both have in front."""
    stack = scale.ndim - 1
    shape = [*scale.shape[:stack], *[1] * (w.ndim - stack)]
    shape[axis] = scale.shape[-1]
    by = scale.reshape(shape).astype(w.dtype)
    return w * by if power == 1 else jnp.where(by == 0, 0, w / jnp.where(by == 0, 1, by))
