"""Batch norms folded into the products before them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.lift._compat import source_line
from jaxopt_compress.rewriting.chains import Analysis, Chain, affine, analyze
from jaxopt_compress.rewriting.report import check_results
from jaxopt_compress.rewriting.staging import Staged, along, run_step, shapes, stage, value_of
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree

_CLOSED = {"scan", "while", "cond", "checkpoint", "custom_jvp_call", "custom_vjp_call", "shard_map"}


class FoldedNorms(NamedTuple):
    """Parameters without batch norms, and functions rewritten to take them.

    Attributes:
        params: The new parameters: products hold the scales, the last parameter that was added
            holds the bias, and all other parameters of the norm are None.
        original: The parameters before.
        folds: Weight -> (where the bias is, or None; the paths that are None now).
        skipped: Weight -> why its norm was not folded.
        channels: Weight -> its axis of output channels and, per channel, the scale and the bias
            that were folded, and how the bias depends on the parameter that holds it now.
    """

    params: PyTree
    original: PyTree
    folds: dict[str, tuple[str | None, tuple[str, ...]]]
    skipped: dict[str, str]
    channels: dict[str, tuple[int, jax.Array, jax.Array, jax.Array]]

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``g`` with ``g(rewrite.params, *args)`` equal to ``fn(params, *args)``.

        Args:
            fn: Any function of the original parameters.

        Returns:
            A function of the new parameters. It raises a ValueError when ``fn`` uses a folded
            parameter in another way, such as the training form of a batch norm.
        """

        def rewritten(params: PyTree, *args: PyTree, **kwargs: Any) -> PyTree:
            staged = stage(fn, shapes(self.original), args, kwargs)
            found = analyze(staged)
            chains = self._matching(staged, found)
            return _replay(staged, found, chains, self._leaves(params))

        return rewritten

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the original parameters, such as masks, in the new structure.

        Args:
            x: A tree of the original structure. Booleans keep their meaning everywhere.

        Returns:
            The same leaves without those of folded norms.

        Raises:
            ValueError: A leaf of numbers stands beside a parameter that changed, such as a moment.
        """
        changed = {*self.folds, *(bias for bias, _ in self.folds.values())}
        gone = {path for _, paths in self.folds.values() for path in paths}
        out = []
        for (path, _), leaf in zip(named_leaves(self.original), self._leaves(x), strict=True):
            if path in changed and leaf is not None and jnp.asarray(leaf).dtype != bool:
                raise ValueError(
                    f"{path!r} of shape {jnp.shape(leaf)} was changed by folding: numbers beside "
                    "it have no meaning for the new parameter; compute them anew"
                )
            out.append(None if path in gone else leaf)
        return jax.tree.structure(self.original).unflatten(out)

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, as parameters of the original function.

        Args:
            x: A tree of the structure of ``params``.

        Returns:
            A tree of the original structure; the dropped parameters are the original ones.
        """
        old = jax.tree.leaves(self.original)
        leaves = [o if n is None else n for o, n in zip(old, self._leaves(x), strict=True)]
        at = {path: i for i, (path, _) in enumerate(named_leaves(self.original))}
        for path, (bias, _) in self.folds.items():
            axis, scale, offset, slope = self.channels[path]
            i = at[path]
            by = along(scale, axis, old[i].ndim)
            # A channel that its norm multiplies by 0 is lost: the original stands for it.
            undone = leaves[i] / jnp.where(by == 0, 1, by)
            leaves[i] = jnp.where(by == 0, old[i], undone).astype(old[i].dtype)
            if bias is not None:
                i = at[bias]
                change = (leaves[i].reshape(-1) - offset) / jnp.where(slope == 0, 1, slope)
                leaves[i] = (old[i] + change.reshape(old[i].shape)).astype(old[i].dtype)
        return jax.tree.structure(self.original).unflatten(leaves)

    check = check_results

    def _leaves(self, params: PyTree) -> list[Leaf]:
        return jax.tree.structure(self.original).flatten_up_to(params)

    def _matching(self, staged: Staged, found: Analysis) -> list[Chain]:
        names = [path for path, _ in named_leaves(self.original)]
        at = {path: i for i, path in enumerate(names)}
        read = {i for s in staged.steps for i in s.inputs if isinstance(i, int)}
        read |= {i for i in staged.outputs if isinstance(i, int)}
        by_weight = {c.weight: c for c in found.chains}
        chains = []
        for path, (bias, gone) in self.folds.items():
            chain = by_weight.get(at[path])
            wanted = (None if bias is None else at[bias], tuple(sorted(at[p] for p in gone)))
            if chain is not None and (chain.bias, chain.dropped) == wanted:
                chains.append(chain)
                continue
            used = [i for i in (at[path], *wanted[1], wanted[0]) if i is not None and i in read]
            if used:
                lines = [source_line(s.eqn) for s in staged.steps if used[0] in s.inputs]
                line = lines[0] if lines else "the function's result"
                raise ValueError(
                    f"{names[used[0]]!r} is used at {line} in another way than the norm that was "
                    f"folded into {path!r}; the rewritten function needs the inference form of it"
                )
        return chains


def _replay(staged: Staged, found: Analysis, chains: list[Chain], leaves: list[Leaf]) -> PyTree:
    """Runs the equations with folded products in the place of chains."""
    env = {**staged.constants, **{i: x for i, x in enumerate(leaves) if x is not None}}
    env.update(enumerate(staged.arguments, staged.leaves))
    inside = {n: chain for chain in chains for n in chain.steps}
    for n, step in enumerate(staged.steps):
        known = all(not isinstance(i, int) or i in env for i in step.inputs)
        if n in inside and len(step.inputs) == 2:
            # The weight holds the scale, and the last step adds the bias.
            chain = inside[n]
            before = chain.steps.index(n)
            at = chain.product if before == 0 else chain.steps[before - 1]
            y = env[staged.steps[at].outputs[0]]
            if n == chain.steps[-1] and chain.bias is not None:
                y = y + along(
                    jnp.asarray(leaves[chain.bias]).reshape(-1), chain.channels[-1], y.ndim
                )
            env[step.outputs[0]] = y.astype(step.out.dtype)
        elif known or n not in found.fixed:
            run_step(env, step)  # others read a dropped parameter, and only chains read them
    return staged.out_tree.unflatten([value_of(env, x) for x in staged.outputs])


def fold_norms(
    fn: Callable[..., PyTree], params: PyTree, *args: PyTree, **kwargs: Any
) -> FoldedNorms:
    """Folds batch norms, in their inference form, into the products before them.

    A product followed by ``y = gamma * (x @ W + b - mean) / sqrt(var + eps) + beta``, in whatever
    order it is written, is ``x @ (a W) + c`` with ``a`` and ``c`` per output channel. Norms are
    found in the staged function, not by modules or names. Products in scans, remat and functions
    with custom derivatives are not entered. Casts, transposes and reshapes may be in between. A
    weight whose result is multiplied by parameters in any other way is listed in ``skipped``.

    Args:
        fn: Any JAX function; it holds the inference form of its norms.
        params: All that the norms read: weights, scales, offsets and statistics.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        **kwargs: Likewise.

    Returns:
        The rewrite: ``params``, ``function(f)``, ``tree(x)``, ``undo(x)``, ``check(f, ...)``; in
        ``skipped`` the weights whose norms were left as they are, with the reason.

    Raises:
        ValueError: No norm can be folded; says why for each that was refused.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> def fn(p, x):
        ...     return (x @ p["w"] - p["mean"]) * p["scale"] + p["bias"]
        >>> p = {"w": jnp.ones((2, 3)), "mean": jnp.ones(3), "scale": jnp.arange(1.0, 4)}
        >>> p["bias"] = jnp.zeros(3)
        >>> rw = jc.fold_norms(fn, p, jnp.ones((1, 2)))
        >>> rw.params["bias"].tolist(), rw.params["mean"]
        ([-1.0, -2.0, -3.0], None)
        >>> rw.function(fn)(rw.params, jnp.ones((1, 2))).tolist()
        [[1.0, 2.0, 3.0]]
    """
    staged = stage(fn, shapes(params), args, kwargs)
    found = analyze(staged)
    names = [path for path, _ in named_leaves(params)]
    skipped = {names[i]: why for i, why in found.refused.items()}
    skipped.update(_hidden(staged, names))
    if not found.chains:
        raise ValueError(
            f"fold_norms found no batch norm in inference form after a product; skipped: {skipped}"
        )
    leaves, new = jax.tree.leaves(params), jax.tree.leaves(params)
    folds, channels = {}, {}
    for chain in found.chains:
        path = names[chain.weight]
        w = leaves[chain.weight]
        a, b = affine(staged, chain, found.fixed, leaves)
        by = along(a, chain.weight_axis, w.ndim)
        new[chain.weight] = (w * by).astype(w.dtype)
        slope = jnp.ones_like(b)
        bias = None if chain.bias is None else names[chain.bias]
        if chain.bias is not None:
            old = jnp.asarray(leaves[chain.bias])
            new[chain.bias] = b.reshape(old.shape).astype(old.dtype)

            def moved(x: jax.Array, chain: Chain = chain) -> jax.Array:
                values = [x if i == chain.bias else leaf for i, leaf in enumerate(leaves)]
                return affine(staged, chain, found.fixed, values)[1]

            slope = jax.jvp(moved, (old,), (jnp.ones_like(old),))[1]
        for i in chain.dropped:
            new[i] = None
        folds[path] = (bias, tuple(names[i] for i in chain.dropped))
        channels[path] = (chain.weight_axis, a, b, slope)
    tree = jax.tree.structure(params).unflatten(new)
    return FoldedNorms(tree, params, folds, skipped, channels)


def _hidden(staged: Staged, names: list[str]) -> dict[str, str]:
    """Weights of products in control flow, which is not entered."""
    out = {}
    for step in staged.steps:
        if step.eqn.primitive.name in _CLOSED:
            for i in step.inputs:
                if isinstance(i, int) and i < staged.leaves:
                    line = source_line(step.eqn)
                    out[names[i]] = f"it is used inside of {step.eqn.primitive.name} at {line}"
    return out
