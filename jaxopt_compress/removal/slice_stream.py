"""Streams cut to the directions in which activations vary most."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import NeedsStats
from jaxopt_compress.lift import Statistics
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.removal.find import find_groups
from jaxopt_compress.removal.groups import Groups
from jaxopt_compress.removal.rewrite import Removed
from jaxopt_compress.rewriting.coupling.coupling import NotRemovable
from jaxopt_compress.rewriting.report import Difference, difference
from jaxopt_compress.rewriting.rotatable import Rotatable
from jaxopt_compress.rewriting.rotate import Rotated, rotated_by
from jaxopt_compress.tree import map_named, named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class Sliced(NamedTuple):
    """A rotation of streams, and the removal of their last channels.

    Attributes:
        rotation: The first rewrite.
        removal: The second, of the function and the parameters of the first.
        kept: Path -> axis -> how many channels are left of how many.
    """

    rotation: Rotated
    removal: Removed
    kept: dict[str, dict[int, tuple[int, int]]]

    @property
    def params(self) -> PyTree:
        """The smaller parameters."""
        return self.removal.params

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``g`` with ``g(rewrite.params, *args)`` equal to ``fn(rewrite.undo(params), *args)``.

        Args:
            fn: Any function of the original parameters that has the same streams.
        """
        return self.removal.function(self.rotation.function(fn))

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the original parameters, of which none beside changed ones has a meaning.

        Raises:
            ValueError: A leaf stands beside a parameter that changed.
        """
        return self.removal.tree(self.rotation.tree(x))

    def undo(self, x: PyTree) -> PyTree:
        """New parameters for the original function: projections to the directions that are left."""
        folded = {scale for _, scale in self.rotation.scales.values()}

        def whole(path: str, leaf: Leaf) -> Leaf:
            # Scales are folded into the weights, so that channels that went have one of 1.
            if path not in folded or path not in self.removal.gone:
                return leaf
            return jnp.where(jnp.asarray(self.removal.gone[path][-1]), 1, leaf).astype(leaf.dtype)

        return self.rotation.undo(map_named(whole, self.removal.undo(x)))

    def check(
        self,
        fn: Callable[..., PyTree],
        *args: PyTree,
        tolerance: float | None = None,
        **kwargs: Any,
    ) -> Difference:
        """Measures the rewritten function against ``fn`` of the projected parameters.

        Args:
            fn: A function of the original parameters.
            *args: Its other arguments.
            tolerance: The largest relative difference that does not raise; None never raises.
            **kwargs: Further arguments.

        Returns:
            The largest absolute and relative difference.
        """
        got = jax.jit(self.function(fn))(self.params, *args, **kwargs)
        want = jax.jit(fn)(self.undo(self.params), *args, **kwargs)
        return difference(got, want, tolerance)


def slice_stream(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    stats: Mapping[str, Sequence[Statistics]],
    keep: float = 0.8,
    round_to: int = 1,
    **kwargs: Any,
) -> Sliced:
    r"""Cuts streams of channels, such as the residual stream, to their leading directions.

    .. math:: C = \sum_{\text{readers}} E[x x^T] / \mathrm{tr}\, E[x x^T] = Q \Lambda Q^T, \qquad
        W_{\text{write}} \to W Q_k, \quad W_{\text{read}} \to Q_k^T W

    Streams are found and rotated as by `rotate`, with the eigenvectors of their readers' inputs
    in the place of a Hadamard matrix, from the largest eigenvalue on; then the last channels are
    removed as by `find_groups`. Norms by the root of the mean square divide by as many channels as
    before. One basis serves a stream from its first to its last layer, so that sums need no
    products of their own. Layer norms that subtract a mean depend on the basis, and their streams
    stay as they are.

    Args:
        fn: Any JAX function.
        params: Its parameters.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        stats: The second moments of inputs, from ``calibrate(fn, params, batches)``.
        keep: The share of the channels of each stream that is left, above 0, at most 1.
        round_to: The number of channels that is left is a multiple of it, the nearest one.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The rewrite: ``params``, ``function(f)``, ``undo(x)``, ``check(f, ...)``; in
        ``rotation.skipped`` the parameters whose channels stay, with the reason.

    Raises:
        NeedsStats: No second moment of a stream is there.
        NotRemovable: The channels of a stream cannot be removed; says why.
        ValueError: There is no stream to rotate, ``keep`` is out of range, or a second moment is
            NaN or infinite; names the parameter.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> def fn(p, ids):
        ...     x = p["table"][ids]
        ...     normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True)) * p["scale"]
        ...     return jax.nn.relu(normed @ p["up"]) @ p["down"]
        >>> keys, ids = jax.random.split(jax.random.key(0), 4), jnp.arange(50)
        >>> p = {"table": jax.random.normal(keys[0], (50, 4)) @ jax.random.normal(keys[3], (4, 64))}
        >>> p |= {"scale": jnp.arange(1.0, 65), "up": jax.random.normal(keys[1], (64, 8))}
        >>> p |= {"down": jnp.ones((8, 2))}
        >>> rw = jc.slice_stream(fn, p, ids, stats=jc.calibrate(fn, p, [ids]), keep=1 / 16)
        >>> rw.params["table"].shape, rw.params["up"].shape
        ((50, 4), (4, 8))
        >>> got = rw.function(fn)(rw.params, ids)
        >>> bool(jnp.allclose(got, fn(p, ids), rtol=1e-3, atol=1e-3))
        True

    References:
        Ashkboos et al., 2024, SliceGPT: Compress Large Language Models by Deleting Rows
        and Columns.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}; it is the share of channels that is left, in (0, 1]")
    if type(round_to) is not int or round_to < 1:
        raise ValueError(f"round_to={round_to!r}: it is a number of channels, such as 128")
    leaves = dict(named_leaves(params))
    bases = lambda found: _bases(found, leaves, stats)
    rotation = rotated_by(bases, fn, params, args, kwargs)
    groups = find_groups(rotation.function(fn), rotation.params, *args, **kwargs)
    kept, units = {}, {}
    for path, axes in rotation.axes.items():
        for axis, stream in axes.items():
            size = rotation.turns[stream].shape[0]
            left = min(size, max(1, round(keep * size / round_to)) * round_to)
            kept.setdefault(path, {})[axis] = left, size
            name, own = _last_units(groups, path, axis, left)
            units[name] = sorted({*units.get(name, []), *own})
    plan = groups.plan({name: own for name, own in units.items() if own})
    return Sliced(rotation, plan.rewrite(), kept)


def _last_units(groups: Groups, path: str, axis: int, left: int) -> tuple[str, list[int]]:
    """The group whose units are the channels of an axis, and which of them go.

    Raises:
        NotRemovable: There is none.
    """
    for name, group in groups.items():
        for member in group.members:
            if (member.path, member.axis) == (path, axis):
                gone = np.all(member.indices >= left, axis=1)
                return name, np.flatnonzero(gone).tolist()
    raise NotRemovable(
        f"the channels of {path!r} along axis {axis} cannot be removed: {groups.why(path, axis)}"
    )


def _bases(
    found: Rotatable, leaves: Mapping[str, Leaf], stats: Mapping[str, Sequence[Statistics]]
) -> tuple[jax.Array, ...]:
    """The eigenvectors of the inputs of each stream's readers, from the largest value on.

    Raises:
        NeedsStats: Nothing is known of a stream.
        ValueError: A moment is NaN or infinite.
    """
    totals: dict[int, jax.Array] = {}
    for path, axes in found.axes.items():
        for axis, stream in axes.items():
            for own in stats.get(path, ()):
                if own.contracting != (axis - leaves[path].ndim,) or not own.has("moments"):
                    continue
                wide = promoted(leaves[path].dtype, jnp.float32)
                moment = own.second_moment.astype(wide)
                if not is_traced(moment) and not bool(jnp.isfinite(moment).all()):
                    raise ValueError(
                        f"the second moments of the inputs of {path!r} along axis {axis} are NaN "
                        "or infinite: calibrate with batches of which all activations are finite"
                    )
                if path in found.scales:
                    # Before the norm's scale, which is folded into the reader.
                    scale = leaves[found.scales[path][1]].astype(wide)
                    by = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
                    moment = moment * by[..., None, :] * by[..., :, None]
                moment = moment.reshape(-1, *moment.shape[-2:])
                trace = jnp.trace(moment, axis1=-2, axis2=-1)[:, None, None]
                share = jnp.sum(moment / jnp.where(trace > 0, trace, 1), 0)
                totals[stream] = totals.get(stream, 0) + share
    for stream in range(len(found.sizes)):
        if stream not in totals:
            paths = sorted(p for p, axes in found.axes.items() if stream in axes.values())
            raise NeedsStats(
                f"slice_stream needs second moments of what reads the stream of {paths[:4]}: pass "
                "stats=jaxopt_compress.calibrate(fn, params, batches)"
            )
    return tuple(jnp.linalg.eigh(totals[stream])[1][:, ::-1] for stream in range(len(found.sizes)))
