"""Pruning in which later weights make up for the zeros of earlier ones."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import MaskedArray, is_compressed, materialize
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    NeedsStats,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.leaf_states import N_M, RANK, ZEROS
from jaxopt_compress.compression.matrices import matrices_of
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.numerics.solvers.admm import admm
from jaxopt_compress.numerics.solvers.sparse_gpt import sparse_gpt as solve
from jaxopt_compress.sparsity.reconstruct import check_rounds
from jaxopt_compress.sparsity.state import PrunedState, leading_stack
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pruned", "change"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SparseGPTState(LeafState):
    """A mask, and what the other entries were changed by; no update changes either.

    Attributes:
        pruned: The mask, as a `PrunedState`.
        change: Float32 of the parameter's shape, added to it.
    """

    pruned: PrunedState
    change: Leaf
    kind = "sparse_gpt"
    keeps = frozenset({ZEROS, N_M, RANK})

    @property
    def establishes(self) -> frozenset[str]:
        """Zeros, and perhaps a pattern of them."""
        return self.pruned.establishes

    def apply(self, w: Leaf, learned: PyTree) -> MaskedArray:
        """The changed parameter under the mask; the derivative is 1 where an entry is kept."""
        # Zeros under the mask too: what follows takes the corrected parameter for the whole one.
        return self.pruned.apply(jnp.where(self.pruned.mask, self._changed(w), 0), learned)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Leaf:
        """The kept entries."""
        return self.pruned.compress(self._changed(w), learned, path)

    def _changed(self, w: Leaf) -> jax.Array:
        w = materialize(w)
        return seal(w.astype(jnp.float32) + self.change, w.dtype)


def sparse_gpt(
    sparsity: float,
    pattern: str | None = None,
    where: Where = None,
    *,
    stack: int = 0,
    damping: float = 0.01,
    rounds: int = 0,
) -> Compression:
    r"""Sets entries to zero so that products change little, the others making up for it.

    For each parameter, and each entry of a stack on its own, it minimizes row after row of the axes
    that are summed over

    .. math:: \mathrm{tr}(D^T H D), \qquad D = \hat W - W, \quad H = E[x x^T]

    Zeros are those of least cost among each 128 rows, or of a pattern. Before `gptq` in a chain it
    prunes what is then quantized. The mask and the change of the other entries are final: in
    training the parameter moves from there, under the mask.

    Args:
        sparsity: The share of zeros.
        pattern: None, or ``"n:m"`` along the last axis that is summed over, such as ``"2:4"``;
            ``sparsity`` is then ``1 - n / m``.
        where: As in `prune`.
        stack: As in `prune`.
        damping: The share of its mean diagonal that is added to the diagonal of :math:`H`, more
            where float32 cannot factorize it.
        rounds: Afterwards, under the mask that was found, so many rounds of `reconstruct`; 20 are
            usual. In one pass, earlier rows cannot make up for the zeros of later ones.

    Returns:
        A `Compression` that stores `SparseArray`.

    Raises:
        NeedsStats: In ``init``: a parameter has no second moments of its inputs.
        ValueError: A sparsity outside of 0 to 1, or one that contradicts the pattern; a pattern
            that does not divide the last of several axes that are summed over.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.arange(1.0, 9.0).reshape(8, 1)}
        >>> model = lambda params, x: x @ params["w"]
        >>> x = jax.random.normal(jax.random.key(0), (64, 8)) + 1
        >>> stats, uses = jc.calibrate(model, params, [x]), jc.uses(model, params, x)
        >>> small = jc.compress(params, jc.sparse_gpt(0.5, "2:4"), uses=uses, stats=stats)
        >>> (small["w"].materialize()[:, 0] > 0).astype(int)
        Array([0, 0, 1, 1, 0, 0, 1, 1], dtype=int32)

    References:
        Frantar and Alistarh, 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
        One-Shot.
    """
    n_m = _read_pattern(pattern, sparsity)
    if not damping > 0:
        raise ValueError(f"damping={damping}; it is above 0, such as 0.01")
    check_rounds(rounds, least=0)

    def check(parameter: Parameter) -> None:
        value, stats, layout = parameter.value, parameter.stats, parameter.layout
        if is_compressed(value) and not isinstance(value, MaskedArray):
            raise TypeError(
                f"{parameter.describe()} is a {type(value).__name__}, whose entries cannot be "
                "changed; prune before, or materialize it first"
            )
        if stats is None or not stats.has("moments"):
            raise NeedsStats(
                "sparse_gpt needs second moments of the activations that meet "
                f"{parameter.describe()}: pass stats=jaxopt_compress.calibrate(fn, params, "
                "batches), whose measures include moments(), or run compress_in_order; prune what "
                "is only looked up by jaxopt_compress.prune, or leave it out by where="
            )
        stats.check_finite(parameter.describe(), "moments")
        along = layout.group_axis
        ragged = n_m is not None and along is not None and value.shape[along] % n_m[1]
        if ragged and len(layout.contracting) > 1:
            raise ValueError(
                f"pattern={pattern!r} does not divide axis {along} of {parameter.describe()}, and "
                "the axes before it are summed over too: take another pattern, or none"
            )

    def init(parameter: Parameter) -> Decision:
        shape, layout = tuple(parameter.value.shape), parameter.layout
        matrices = matrices_of(shape, layout, parameter.stats)
        w = parameter.dense().astype(jnp.float32)
        keep = None if parameter.keep is None else matrices.of(parameter.keep)
        moment = matrices.moment(parameter.stats)
        values, mask = solve(matrices.of(w), moment, keep, sparsity, n_m, damping)
        if rounds:
            values = admm(matrices.of(w), moment, mask, rounds, damping)
        mask = matrices.back(mask)
        axis = None if n_m is None else layout.group_axis
        change = jnp.where(mask, matrices.back(values) - w, 0)
        pruned = PrunedState(mask, None, None, None, n_m, axis, leading_stack(parameter))
        return Decision(SparseGPTState(pruned, change))

    asked = spelled("sparse_gpt", sparsity, pattern, where=where, stack=stack or None)
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)


def _read_pattern(pattern: str | None, sparsity: float) -> tuple[int, int] | None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity}; it lies between 0 and 1")
    if pattern is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern={pattern!r}; it is 'n:m' with 0 < n < m, such as '2:4'")
    n, m = int(match[1]), int(match[2])
    if not math.isclose(sparsity, 1 - n / m, abs_tol=1e-6):
        raise ValueError(
            f"pattern={pattern!r} prunes {1 - n / m:.6g} of the entries, not {sparsity:.6g}: write "
            f"sparse_gpt({1 - n / m:.6g}, {pattern!r})"
        )
    return n, m
