"""Weights rotated along what their products sum over; activations are rotated as they meet them."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import RotatedArray, is_compressed
from jaxopt_compress.lift import lift, uses
from jaxopt_compress.lift.observe.uses import Use
from jaxopt_compress.numerics.hadamard import rotated, transform_sizes
from jaxopt_compress.rewriting.report import change_leaves, check_results
from jaxopt_compress.tree import Where, select
from jaxopt_compress.tree.paths import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class RotatedInputs(NamedTuple):
    """Rotated weights, and functions that rotate the activations that meet them.

    Attributes:
        params: The new parameters.
        original: The parameters before.
        axes: Path -> the negative axes along which the parameter was rotated.
        signs: Path -> the signs of its rotation, int8.
        skipped: Path of a chosen parameter -> why it was not rotated.
    """

    params: PyTree
    original: PyTree
    axes: dict[str, tuple[int, ...]]
    signs: dict[str, jax.Array]
    skipped: dict[str, str]

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``g`` with ``g(rewrite.params, *args)`` equal to ``fn(params, *args)``.

        Args:
            fn: Any function of the original parameters.

        Returns:
            A function of the new parameters. It stages ``fn`` whenever it is called, so put it
            under `jax.jit`.
        """

        def turned(params: PyTree, *args: PyTree, **kwargs: Any) -> PyTree:
            return lift(fn)(self._map(self._held, params), *args, **kwargs)

        return turned

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the original parameters for the new ones.

        Args:
            x: A tree of the original structure. Numbers have to be linear in the parameters or in
                gradients, such as averages and first moments: they are rotated as parameters are.

        Raises:
            ValueError: Booleans, such as masks, stand beside a rotated parameter.
        """

        def change(path: str, leaf: Leaf) -> Leaf:
            if jnp.asarray(leaf).dtype == bool:
                raise ValueError(
                    f"{path!r} of shape {jnp.shape(leaf)} was rotated: a mask beside it has no "
                    "meaning for the new parameter; decide it anew"
                )
            return rotated(jnp.asarray(leaf), self.signs[path], self.axes[path])

        return self._map(change, x)

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, for the original function.

        Args:
            x: A tree of the structure of ``params``; leaves may be compressed.

        Returns:
            A tree of the original structure. Compressed leaves become a `RotatedArray` of them, on
            which ``lift(fn)`` runs, and which files hold.
        """

        def back(path: str, leaf: Leaf) -> Leaf:
            if is_compressed(leaf):
                return self._held(path, leaf)
            return rotated(jnp.asarray(leaf), self.signs[path], self.axes[path], inverse=True)

        return self._map(back, x)

    check = check_results

    def _held(self, path: str, leaf: Leaf) -> RotatedArray:
        return RotatedArray(leaf, self.signs[path], self.axes[path])

    def _map(self, change: Callable[[str, Leaf], Leaf], x: PyTree) -> PyTree:

        def change_own(path: str, leaf: Leaf) -> Leaf:
            return leaf if leaf is None or path not in self.axes else change(path, leaf)

        return change_leaves(self.original, change_own, x)


def rotate_inputs(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    where: Where = None,
    key: jax.Array | None = None,
    **kwargs: Any,
) -> RotatedInputs:
    r"""Rotates weights along what their products sum over, and activations before they meet them.

    .. math:: x W = (x R) (R^T W), \qquad R = \mathrm{diag}(s) H

    with random signs and a Hadamard matrix, which spreads outliers over all channels. The product
    stays as it is up to the rounding of floats. Activations are transformed when the function runs,
    in :math:`O(n \log n)` operations per row of :math:`n` channels; `rotate` has no such cost where
    it applies. Axes whose size is no power of two times the size of a known matrix are rotated in
    blocks of neighbors.

    Weights are found in the function, also in scans. Convolutions with windows stay as they are.

    Args:
        fn: Any JAX function.
        params: Its parameters.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        where: Which parameters; by default all that meet products or convolutions.
        key: The random key of the signs; by default ``jax.random.key(0)``. A parameter's signs
            depend on the key and on its path.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The rewrite: ``params``, ``function(f)``, ``tree(x)``, ``undo(x)``, ``check(f, ...)``; in
        ``skipped`` the parameters that were chosen and not rotated, with the reason.

    Raises:
        ValueError: None can be rotated; says why for each.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda p, x: x @ p["w"]
        >>> x = jax.random.normal(jax.random.key(1), (64, 64)).at[:, 3].mul(50.0)
        >>> p = {"w": jax.random.normal(jax.random.key(2), (64, 8))}
        >>> rw = jc.rotate_inputs(fn, p, x)
        >>> bool(rw.check(fn, x).relative < 1e-5)
        True
        >>> g, c = rw.function(fn), jc.quantize("int8", activations="int4")
        >>> small = jc.compress(rw.params, c, uses=jc.uses(g, rw.params, x))
        >>> plain = jc.compress(p, c, uses=jc.uses(fn, p, x))
        >>> error = lambda y: float(jnp.abs(y - fn(p, x)).mean())
        >>> error(jc.lift(g)(small, x)) < 0.5 * error(jc.lift(fn)(plain, x))
        True
        >>> jc.lift(fn)(rw.undo(small), x).tolist() == jc.lift(g)(small, x).tolist()
        True

    References:
        Ashkboos et al., 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.
        Liu et al., 2024, SpinQuant: LLM Quantization with Learned Rotations.
    """
    key = jax.random.key(0) if key is None else key
    found = uses(fn, params, *args, **kwargs)
    axes: dict[str, tuple[int, ...]] = {}
    skipped: dict[str, str] = {}
    leaves = dict(named_leaves(params))
    for path in select(params, where):
        why = None if found.get(path) else "it meets no product in the function"
        if why is None:
            axes[path], why = _summed(tuple(leaves[path].shape), found[path])
        if why is not None:
            axes.pop(path, None)
            if where is not None or found.get(path):
                skipped[path] = why
    if not axes:
        raise ValueError(f"rotate_inputs found no weight to rotate; skipped: {skipped}")
    signs = {}
    for path, own in axes.items():
        whole = leaves[path].shape
        shape = [n if d - len(whole) in own else 1 for d, n in enumerate(whole)]
        of_path = jax.random.fold_in(key, zlib.crc32(path.encode()))
        signs[path] = jax.random.rademacher(of_path, shape, jnp.int8)
    rw = RotatedInputs(params, params, axes, signs, skipped)
    return rw._replace(params=rw.tree(params))


def _summed(shape: tuple[int, ...], found: Sequence[Use]) -> tuple[tuple[int, ...], str | None]:
    """The axes that every use sums over; or why there are none to rotate."""
    first = found[0]
    for use in found:
        line = f" at {use.source}" if use.source else ""
        if use.op not in ("dot_general", "conv_general_dilated"):
            return (), f"it meets {use.op}{line}"
        if use.contracting != first.contracting:
            return (), f"it is summed over other axes too,{line}"
    axes = first.contracting
    if first.op == "conv_general_dilated" and sum(shape[d] > 1 for d in axes) > 1:
        return (), "it is a convolution with a window, whose places are no channels"
    axes = tuple(d for d in axes if transform_sizes(shape[d]))
    return axes, None if axes else "the sizes of its axes that are summed over are odd"
