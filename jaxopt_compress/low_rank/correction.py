"""Another compression, and thin factors of its error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import SumArray, materialize
from jaxopt_compress.compression import Compression, Recipe, as_compression
from jaxopt_compress.compression.checks import check_init
from jaxopt_compress.compression.leaf_states import dense_like
from jaxopt_compress.compression.states import ChainState, method_states
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.low_rank.low_rank import low_rank
from jaxopt_compress.low_rank.whitening import Whiten
from jaxopt_compress.tree import Part, Where, map_named, named_leaves
from jaxopt_compress.typing import Leaf, PyTree


def low_rank_correction(
    compression: Compression | Recipe,
    rank: int,
    where: Where = None,
    *,
    whiten: Whiten = False,
    rounds: int = 1,
    factors_first: bool = False,
    stack: int = 0,
) -> Compression:
    r"""Stores parameters by another compression, and thin factors of its error.

    .. math:: W \approx Q(W) + U V, \qquad
        U V = \arg\min_{\mathrm{rank}\, r} \lVert L^T (W - Q(W) - U V) \rVert_F

    with :math:`L L^T = E[x x^T]` if ``whiten``, which keeps the outputs of products rather than the
    entries (LQER). Under `lift` a product is ``x @ Q + (x @ u) @ v``. With activations rounded, as
    by ``quantize("int4", activations="int4")``, the factors meet them unrounded (SVDQuant).
    With more ``rounds`` the parameter less the factors is compressed anew, and the factors of
    the new error are taken, in turn (LoftQ). With ``factors_first`` the factors are those of the
    parameter itself, and the rest is compressed, whose range is smaller where a few
    directions are large (SVDQuant); further rounds end with the compression then.

    Args:
        compression: A compression of dense parameters, such as `quantize` or `gptq`.
        rank: The inner dimension of the factors, at least 1.
        where: Which of the parameters that it compresses get factors; by default all that can.
        whiten: As in `low_rank`; True needs second moments in ``stats``.
        rounds: How often the parameter is compressed, at least 1.
        factors_first: Whether factors are taken before the first compression and not after it.
        stack: As in `low_rank`, for the factors; the compression has its own.

    Returns:
        A `Compression` that stores `SumArray`; in training the factors learn, and what
        ``compression`` trains does too.

    Raises:
        ValueError: ``rank`` or ``rounds`` is below 1; or as ``compression`` and `low_rank`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
        >>> nearest = jc.compress(params, jc.quantize("int3"))["w"]
        >>> corrected = jc.compress(params, jc.low_rank_correction(jc.quantize("int3"), 4))["w"]
        >>> corrected.describe()
        'int3 plus low rank 4'
        >>> error = lambda w: float(jnp.linalg.norm(w.materialize() - params["w"]))
        >>> error(corrected) < 0.9 * error(nearest)
        True

    References:
        Zhang et al., 2024, LQER: Low-Rank Quantization Error Reconstruction for LLMs. Li et al.,
        2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. Li et al., 2025,
        SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; it is at least 1")
    thin = low_rank(rank=rank, where=where, whiten=whiten, stack=stack)
    pair = _LowRankCorrection(as_compression(compression), thin, rounds, factors_first)
    call = f"low_rank_correction({pair.base!r}, {rank})"
    return Compression(pair.init, pair.update, pair.apply, pair.compress, pair.forward, call=call)


class _LowRankCorrection(NamedTuple):
    """Another compression and thin factors, as the arguments of `low_rank_correction`.

    A state holds that of the compression and that of the factors, and with ``factors_first`` the
    factors that the parameter was less when it was compressed.
    """

    base: Compression
    thin: Compression
    rounds: int
    factors_first: bool

    def init(
        self, params: PyTree, *, uses: Uses | None = None, stats: Stats | None = None
    ) -> ChainState:
        check_init(self._decide, params, uses, stats)
        return self._decide(params, uses=uses, stats=stats)

    def update(self, state: ChainState, params: PyTree, *, grads: PyTree = None) -> ChainState:
        first, second, target, leaves = self._parts(params, state)
        first = self.base.update(first, target, grads=grads)
        own = None if grads is None else _with_factors(grads, second)
        return ChainState((first, self.thin.update(second, leaves, grads=own), *state.states[2:]))

    def apply(self, params: PyTree, state: ChainState, *, materialize: bool = True) -> PyTree:
        return self._view(self.base.apply, params, state, materialize)

    def forward(self, params: PyTree, state: ChainState, *, materialize: bool = True) -> PyTree:
        return self._view(self.base.loss_view, params, state, materialize)

    def compress(self, params: PyTree, state: ChainState) -> PyTree:
        first, second, target, leaves = self._parts(params, state)
        return _sum(self.base.compress(target, first), self.thin.compress(leaves, second))

    def _decide(self, params: PyTree, *, uses: Uses | None, stats: Stats | None) -> ChainState:
        base, given = self.base, {"uses": uses, "stats": stats}
        less = lambda state: _less(params, self._factors(_with_factors(params, state), state))
        first, before = base.init(params, **given), None
        if self.factors_first:
            matrices = {p: w for p, w in _with_factors(params, first).items() if w.ndim >= 2}
            before = self.thin.init(Part(matrices), **given)
            first = base.init(less(before), **given)
        for left in range(self.rounds - 1, -1, -1):
            if self.factors_first and not left:
                # What is added is what the parameter was less, and learns from there on.
                return ChainState((first, jax.tree.map(jnp.copy, before), before))
            target = params if before is None else less(before)
            missed = _missed(params, base.apply(target, first, materialize=False), first)
            second = self.thin.init(missed, **given)
            if left:
                before = second
                first = base.init(less(before), **given)
        return ChainState((first, second) if before is None else (first, second, before))

    def _parts(self, params: PyTree, state: ChainState) -> tuple[PyTree, PyTree, PyTree, Part]:
        """The states of both, what is compressed, and the leaves that have factors."""
        first, second, *before = state.states
        leaves = _with_factors(params, second)
        target = _less(params, self._factors(leaves, before[0])) if before else params
        return first, second, target, leaves

    def _factors(self, leaves: Part, state: PyTree) -> Part:
        return self.thin.apply(leaves, state, materialize=False)

    def _view(
        self, view: Callable[..., PyTree], params: PyTree, state: ChainState, materialize: bool
    ) -> PyTree:
        first, second, target, leaves = self._parts(params, state)
        seen = _sum(view(target, first, materialize=False), self._factors(leaves, second))
        return dense_like(seen, params) if materialize else seen


def _paths(state: PyTree) -> set[str]:
    return {path for own in method_states(state) for path in own.leaves}


def _with_factors(params: PyTree, state: PyTree) -> Part:
    """The leaves that a state knows."""
    own = _paths(state)
    return Part({path: x for path, x in named_leaves(params) if path in own})


def _missed(params: PyTree, view: PyTree, state: PyTree) -> Part:
    """The errors of the views of the parameters that were compressed."""
    own, views = _paths(state), dict(named_leaves(view))
    found = {}
    for path, w in named_leaves(params):
        if path in own and w.ndim >= 2:
            found[path] = _difference(w, views[path])
    return Part(found)


def _less(params: PyTree, factors: Part) -> PyTree:
    """Parameters less the products of factors."""
    own = dict(named_leaves(factors))

    def change(path: str, w: Leaf) -> Leaf:
        if path not in own:
            return w
        return _difference(w, own[path])

    return map_named(change, params)


def _difference(w: jax.Array, view: Leaf) -> jax.Array:
    """``w - view`` in the dtype of ``w``, within its range: infinite entries have no codes."""
    most = float(jnp.finfo(w.dtype).max)
    wide = w.astype(jnp.float32) - materialize(view).astype(jnp.float32)
    return jnp.clip(wide, -most, most).astype(w.dtype)


def _sum(tree: PyTree, factors: Part) -> PyTree:
    """A tree whose leaves hold the products of factors beside what they held."""
    own = dict(named_leaves(factors))
    return map_named(lambda path, w: SumArray((w, own[path])) if path in own else w, tree)
