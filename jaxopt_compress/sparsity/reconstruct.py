"""Least squares for the entries that another method has kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import MaskedArray, SparseArray, materialize
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
from jaxopt_compress.compression.leaf_states import N_M, ZEROS
from jaxopt_compress.compression.matrices import matrices_of
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.numerics.solvers.admm import admm
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["change"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ReconstructedState(LeafState):
    """What kept entries were changed by; no update changes it.

    Attributes:
        change: Float32 of the parameter's shape, added to it; 0 where nothing was kept.
    """

    change: Leaf
    kind = "reconstruct"
    keeps = frozenset({ZEROS, N_M})

    def apply(self, w: Leaf, learned: PyTree) -> Leaf:
        """The changed entries under the mask that they come with."""
        del learned
        return w.replace(values=self._changed(materialize(w))) if isinstance(w, MaskedArray) else w

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Leaf:
        """The changed entries, stored as before."""
        del learned, path
        return w.with_entries(self._changed(materialize(w))) if isinstance(w, SparseArray) else w

    def _changed(self, w: jax.Array) -> jax.Array:
        return seal(w.astype(jnp.float32) + self.change, w.dtype)


def reconstruct(
    where: Where = None, *, rounds: int = 20, damping: float = 0.01, stack: int = 0
) -> Compression:
    r"""Moves the entries that were kept so that products change little; after `prune` in a chain.

    The mask is that of the elements before it. For each parameter, and each entry of a stack on its
    own, it minimizes over the kept entries

    .. math:: \mathrm{tr}(D^T H D), \qquad D = \hat W - W, \quad H = E[x x^T]

    with the parameter before pruning as :math:`W`. So it goes with any score and any pattern, and
    quantization may follow. The change is final: in training the parameter moves from there.
    `sparse_gpt` has made its own corrections, and takes ``rounds=`` itself.

    Args:
        where: Which of the pruned parameters; by default as in `prune`.
        rounds: Rounds of the alternating direction method of multipliers, each one product.
        damping: The share of its mean diagonal that is added to the diagonal of :math:`H`.
        stack: As in `prune`.

    Returns:
        A `Compression` that stores `SparseArray`.

    Raises:
        NeedsStats: In ``init``: a parameter has no second moments of its inputs.
        ValueError: ``rounds`` or ``damping`` is not positive.
        TypeError: In ``init``: a parameter was not pruned before in the same chain.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 4))}
        >>> model = lambda params, x: x @ params["w"]
        >>> x = jax.random.normal(jax.random.key(1), (64, 16)) + 1
        >>> stats, uses = jc.calibrate(model, params, [x]), jc.uses(model, params, x)
        >>> prune = jc.prune(jc.scores.wanda(), jc.schedules.constant(0.5))
        >>> def error(c):
        ...     small = jc.compress(params, c, uses=uses, stats=stats)
        ...     return jnp.linalg.norm(x @ (jc.materialize(small)["w"] - params["w"]))
        >>> bool(error(jc.chain(prune, jc.reconstruct())) < 0.9 * error(prune))
        True

    References:
        Boža, 2024, Fast and Effective Weight Update for Pruned Large Language Models.
    """
    check_rounds(rounds, least=1)
    if not damping > 0:
        raise ValueError(f"damping={damping}; it is above 0, such as 0.01")

    def check(parameter: Parameter) -> None:
        if not isinstance(parameter.value, MaskedArray):
            raise TypeError(
                f"reconstruct moves what a mask keeps, and {parameter.describe()} comes as a "
                f"{type(parameter.value).__name__}: put it right after prune, as in "
                "chain(prune(...), reconstruct())"
            )
        if parameter.stats is None or not parameter.stats.has("moments"):
            raise NeedsStats(
                "reconstruct needs second moments of the activations that meet "
                f"{parameter.describe()}: pass stats=jaxopt_compress.calibrate(fn, params, "
                "batches), whose measures include moments(), or run compress_in_order; leave what "
                "is only looked up out by where="
            )
        parameter.stats.check_finite(parameter.describe(), "moments")

    def init(parameter: Parameter) -> Decision:
        w = parameter.value.values.astype(jnp.float32)
        mask = parameter.value.mask
        matrices = matrices_of(tuple(w.shape), parameter.layout, parameter.stats)
        moment = matrices.moment(parameter.stats)
        made = admm(matrices.of(w), moment, matrices.of(mask), rounds, damping)
        return Decision(ReconstructedState(jnp.where(mask, matrices.back(made) - w, 0)))

    asked = spelled("reconstruct", where=where, stack=stack or None)
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)


def check_rounds(rounds: int, least: int) -> None:
    """Refuses values that are not a number of rounds."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < least:
        raise ValueError(
            f"rounds={rounds!r}; it is a whole number of at least {least}, 20 is usual"
        )
