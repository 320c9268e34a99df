"""Soft thresholds that training learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import MaskedArray, materialize
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.leaf_states import N_M, ZEROS
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.sparsity.state import check_prunable, leading_stack, store_kept
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["threshold"], meta_fields=["stack"]
)
@dataclasses.dataclass(frozen=True)
class SoftState(LeafState):
    """The thresholds of one parameter.

    Attributes:
        threshold: Float32, at least 0, that broadcasts against the parameter: the logistic function
            of the learned parts, which is not the same number in every program.
        stack: How many leading axes hold parameters of their own.
    """

    threshold: Leaf
    stack: int
    kind = "soft_threshold"
    establishes = frozenset({ZEROS})
    keeps = frozenset({ZEROS, N_M})

    def apply(self, w: Leaf, learned: PyTree) -> MaskedArray:
        """``w`` moved towards 0 by the threshold, differentiable with respect to it too."""
        values = _shrunk(materialize(w), learned["threshold"], self.threshold)
        return MaskedArray(values, values != 0)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Leaf:
        """The entries that are not 0."""
        del path
        seen = self.apply(w, learned)
        return store_kept(seen.values, seen.mask, self.stack)


@jax.custom_jvp
def _shrunk(w: jax.Array, learned: jax.Array, threshold: jax.Array) -> jax.Array:
    del learned
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    left = jnp.abs(wide) - threshold
    return seal(jnp.where(left > 0, jnp.where(wide < 0, -left, left), 0), w.dtype)


@_shrunk.defjvp
def _shrunk_jvp(primals: PyTree, tangents: PyTree) -> tuple[jax.Array, jax.Array]:
    w, learned, threshold = primals
    sign = jnp.where(jnp.abs(w) > threshold, jnp.sign(w), 0)
    share = jax.nn.sigmoid(learned)
    slope = tangents[1] * share * (1 - share)
    change = jnp.where(sign != 0, tangents[0], 0) - (sign * slope).astype(w.dtype)
    return _shrunk(*primals), change


def soft_threshold(
    where: Where = None, *, initial: float = -5.0, per: str = "tensor", stack: int = 0
) -> Compression:
    r"""Moves entries towards 0 by thresholds that training learns.

    .. math:: \hat w = \mathrm{sign}(w) \, \max(|w| - \sigma(s), 0)

    with the logistic function :math:`\sigma`. The ``penalty`` is :math:`\tfrac12 \sum s^2`, which
    lifts thresholds: how much of it the loss gets decides on the sparsity. Views are smaller than
    parameters, so models have to be trained with it.

    Args:
        where: As in `prune`.
        initial: Where ``s`` starts: -5 for a threshold of 0.0067.
        per: ``"tensor"``: one threshold for all of a parameter, and for each entry of a stack;
            ``"channel"``: one per output.
        stack: As in `prune`.

    Returns:
        A `Compression` with learned parts, that stores `SparseArray`.

    Raises:
        ValueError: Another ``per``; in ``init``: a scalar.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.soft_threshold(initial=0.0)
        >>> params = {"w": jnp.array([[2.0, -1.0], [0.25, 0.75]])}
        >>> c.apply(params, c.init(params))["w"]
        Array([[ 1.5 , -0.5 ],
               [ 0.  ,  0.25]], dtype=float32)

    References:
        Kusupati et al., 2020, Soft Threshold Weight Reparameterization for Learnable Sparsity.
    """
    if per not in ("tensor", "channel"):
        raise ValueError(f"per={per!r}; there are 'tensor' and 'channel'")

    def init(parameter: Parameter) -> Decision:
        layout, shape = parameter.layout, parameter.value.shape
        apart = {*layout.stack, *(layout.output if per == "channel" else ())}
        rank = len(shape)
        start = jnp.full([shape[d] if d in apart else 1 for d in range(-rank, 0)], initial)
        return decided(leading_stack(parameter), {"threshold": start.astype(jnp.float32)})

    def decided(stack: int, learned: PyTree) -> Decision:
        return Decision(SoftState(jax.nn.sigmoid(learned["threshold"]), stack), learned)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        del count, parameter
        return decided(decision.state.stack, decision.learned)

    def penalty(decision: Decision, parameter: Parameter) -> jax.Array:
        del parameter
        return 0.5 * jnp.sum(jnp.square(decision.learned["threshold"]))

    asked = spelled("soft_threshold", where=where, per=per, stack=stack or None)
    method = LeafMethod(check_prunable, init, update, penalty)
    return compression_of(method, where, stack=stack, asked=asked)
