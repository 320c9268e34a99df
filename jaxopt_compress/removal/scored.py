"""Groups with numbers that say how much each of their units matters."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.removal.group import Group
from jaxopt_compress.removal.losses import losses, losses_of_blocks
from jaxopt_compress.removal.scoring import Reduce, block_scores, entry_scores, unit_scores
from jaxopt_compress.sparsity.score import Score, as_score
from jaxopt_compress.sparsity.scores import is_magnitude, magnitude
from jaxopt_compress.tree import Where, named_leaves, select
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import PyTree


class ScoredGroups(Mapping[str, Group]):
    """Groups by their names, and scores of their units.

    Attributes:
        params: The parameters that groups were found on.
        observe: How the function uses them; staged when it is asked for.
    """

    params: PyTree
    observe: Callable[[], Uses]

    def scores(
        self,
        score: Score | Callable[..., jax.Array] | None = None,
        reduce: Reduce = "l2",
        *,
        params: PyTree = None,
        grads: PyTree = None,
        uses: Uses | None = None,
        stats: Stats | None = None,
        where: Where = None,
    ) -> dict[str, np.ndarray]:
        """A score for each unit: the higher, the more it matters.

        Those of batch norms' scales, by which network slimming removes channels, are
        ``scores(where="**/scale")``.

        Args:
            score: Of entries: one of `jaxopt_compress.scores`, or a function of a `Parameter`; by
                default the magnitude.
            reduce: How the scores of all entries that go with a unit become one: ``l2`` (the root
                of the sum of squares), ``sum``, ``mean`` or ``max``.
            params: Parameters; by default those that groups were found on.
            grads: Their gradients, for scores that read ``parameter.grad``.
            uses: From `uses`, for scores that read ``parameter.layout``; by default those of the
                call that groups were found on.
            stats: From `calibrate`, for scores that read ``parameter.stats``. Parameters without
                any, such as biases, do not count then.
            where: The parameters that count, as in `prune`; by default all that shrink.

        Returns:
            Group -> float array, one number per unit; of groups in which a parameter counts.

        Raises:
            ValueError: ``reduce`` is none of these, or there is no such group.

        References:
            Liu et al., 2017, Learning Efficient Convolutional Networks through Network Slimming.
        """
        if reduce not in ("l2", "sum", "mean", "max"):
            raise ValueError(f"reduce={reduce!r}; it is 'l2', 'sum', 'mean' or 'max'")
        params = self.params if params is None else params
        touched = {m.path for group in self.values() for m in group.members}
        touched |= {path for group in self.values() for own in group.paths for path in own}
        if where is not None:
            touched &= set(select(params, where, "where"))
        paths = frozenset(p for p, x in named_leaves(params) if p in touched and is_float(x))
        slopes = {} if grads is None else dict(named_leaves(grads))
        by = as_score(score or magnitude())
        if uses is None and not is_magnitude(by):
            uses = self.observe()
        scored = entry_scores(by, params, paths, slopes, uses, stats)
        count = {n: g.members for n, g in self.items() if any(m.path in scored for m in g.members)}
        found = {name: unit_scores(scored, members, reduce) for name, members in count.items()}
        for name, group in self.items():
            if any(path in scored for own in group.paths for path in own):
                found[name] = block_scores(scored, group.paths, reduce)
        if self and not found:
            raise ValueError(f"where={where!r} leaves no parameter of any group; see table()")
        return found

    def losses(
        self,
        loss: Callable[..., jax.Array],
        *args: PyTree,
        params: PyTree = None,
        names: Sequence[str] | None = None,
        at_once: int = 8,
    ) -> dict[str, np.ndarray]:
        """The loss without each unit, all others being there: the most direct score of all.

        It is that of masked parameters, so shapes stay, and units are mapped by `jax.vmap`. For a
        budget take what the loss grows by, ``np.maximum(found - whole, 0)``.

        Args:
            loss: ``loss(params, *args) -> scalar``.
            *args: Such as one batch.
            params: Parameters; by default those that groups were found on.
            names: Of groups; by default all.
            at_once: How many units are mapped at a time; others wait, so that memory is bounded.

        Returns:
            Group -> float array, one loss per unit.

        Raises:
            ValueError: There is no group of a name, or ``loss`` returns more than one number.

        Example:
            >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
            >>> fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
            >>> p = {"w": jnp.eye(3), "v": jnp.array([[1.0], [2.0], [3.0]])}
            >>> groups = jc.find_groups(fn, p, jnp.ones((1, 3)))
            >>> groups.losses(lambda p, x: jnp.sum(fn(p, x)), jnp.ones((1, 3)))["w:1"]
            array([5., 4., 3.], dtype=float32)

        References:
            Molchanov et al., 2017, Pruning Convolutional Neural Networks for Resource Efficient
            Inference (its oracle).
        """
        wanted = list(self) if names is None else list(names)
        if missing := [name for name in wanted if name not in self]:
            raise ValueError(f"there is no group {missing[0]!r}; there are {', '.join(self)}")
        params = self.params if params is None else params
        members = {n: self[n].members for n in wanted if not self[n].paths}
        found = losses(loss, params, args, members, at_once)
        blocks = [n for n in wanted if self[n].paths]
        return found | {n: losses_of_blocks(loss, params, args, self[n].paths) for n in blocks}
