"""Random gates that are exactly 0 at times, for a penalty on the number of parameters."""

import dataclasses
import functools
import math
from typing import Any

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
from jaxopt_compress.sparsity.keys import impl_of, key_of, renewed, words_for
from jaxopt_compress.sparsity.state import check_prunable, leading_stack, store_kept
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree

# The distribution of the paper: its temperature, and the interval that it is stretched to.
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["gate", "words"], meta_fields=["stack", "impl"]
)
@dataclasses.dataclass(frozen=True)
class GatedState(LeafState):
    """The gates of one parameter.

    Attributes:
        gate: Float32 in [0, 1] that broadcasts against the parameter: gates without noise.
        words: Those of the random key of this step.
        stack: How many leading axes hold parameters of their own.
        impl: The kind of generator.
    """

    gate: Leaf
    words: Leaf
    stack: int
    impl: Any
    kind = "hard_concrete"
    establishes = frozenset({ZEROS})
    keeps = frozenset({ZEROS, N_M})

    def apply(self, w: Leaf, learned: PyTree) -> MaskedArray:
        """``w`` times gates without noise."""
        del learned
        w = materialize(w)
        return MaskedArray(_times(w, self.gate), jnp.broadcast_to(self.gate > 0, w.shape))

    def forward(self, w: Leaf, learned: PyTree) -> jax.Array:
        """``w`` times random gates, differentiable with respect to what is learned too."""
        w = materialize(w)
        noise = jax.random.logistic(key_of(self.words, self.impl), self.gate.shape)
        share = jax.nn.sigmoid((noise + learned["log_alpha"]) / _BETA)
        return (w * _stretched(share)).astype(w.dtype)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Leaf:
        """The entries behind open gates."""
        del path
        seen = self.apply(w, learned)
        return store_kept(seen.values, seen.mask, self.stack)


def _stretched(share: jax.Array) -> jax.Array:
    return jnp.clip(share * (_HIGH - _LOW) + _LOW, 0, 1)


@jax.custom_jvp
def _times(w: jax.Array, gate: jax.Array) -> jax.Array:
    return seal(w.astype(jnp.promote_types(w.dtype, jnp.float32)) * gate, w.dtype)


@_times.defjvp
def _times_jvp(primals: PyTree, tangents: PyTree) -> tuple[jax.Array, jax.Array]:
    return _times(*primals), (tangents[0] * primals[1]).astype(primals[0].dtype)


def hard_concrete(
    key: jax.Array,
    where: Where = None,
    *,
    per: str = "entry",
    initial: float = 0.9,
    stack: int = 0,
) -> Compression:
    r"""Multiplies entries by random gates, of which training learns how often they are 0.

    .. math:: \hat w = w \, \min(1, \max(0, 1.2 \, \sigma((\ell + \log \alpha) / \beta) - 0.1)),
        \qquad \beta = 2/3

    with logistic noise :math:`\ell` while training (``view``) and without it in ``apply`` and in
    what is stored. The ``penalty`` is the expected number of entries whose gates are not 0,

    .. math:: \sum \sigma(\log \alpha - \beta \log(0.1 / 1.1)).

    Args:
        key: A random key. Each parameter has numbers of its own, and new ones at each update.
        where: As in `prune`.
        per: ``"entry"``: a gate for each; ``"channel"``: one per output; ``"input"``: one per entry
            of the last contracted axis.
        initial: The probability, in (0, 1), with which a gate opens at first, as if not stretched.
        stack: As in `prune`.

    Returns:
        A `Compression` with learned parts, that stores `SparseArray`.

    Raises:
        ValueError: Another ``per``, or ``initial`` out of range; in ``init``: a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.hard_concrete(jax.random.key(0), initial=0.95)
        >>> params = {"w": jnp.array([[2.0, -1.0]])}
        >>> state = c.init(params)
        >>> c.apply(params, state)["w"].round(2), round(float(c.penalty(params, state)), 2)
        (Array([[ 2., -1.]], dtype=float32), 1.98)

    References:
        Louizos et al., 2018, Learning Sparse Neural Networks through L0 Regularization.
    """
    if per not in ("entry", "channel", "input"):
        raise ValueError(f"per={per!r}; there are 'entry', 'channel' and 'input'")
    if not 0 < initial < 1:
        raise ValueError(f"initial={initial}; it is a probability in (0, 1)")
    impl, start = impl_of(key), math.log(initial / (1 - initial))

    def init(parameter: Parameter) -> Decision:
        layout, shape = parameter.layout, parameter.value.shape
        rank = len(shape)
        own = {
            "entry": range(-rank, 0),
            "channel": layout.output,
            "input": [d for d in [layout.group_axis] if d is not None],
        }[per]
        gates = [shape[d] if d in (*own, *layout.stack) else 1 for d in range(-rank, 0)]
        learned = {"log_alpha": jnp.full(gates, start, jnp.float32)}
        return decided(words_for(key, parameter.path), leading_stack(parameter), learned)

    def decided(words: jax.Array, stack: int, learned: PyTree) -> Decision:
        gate = _stretched(jax.nn.sigmoid(learned["log_alpha"]))
        return Decision(GatedState(gate, words, stack, impl), learned)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        del count, parameter
        words = renewed(decision.state.words, impl)
        return decided(words, decision.state.stack, decision.learned)

    def penalty(decision: Decision, parameter: Parameter) -> jax.Array:
        log_alpha = decision.learned["log_alpha"]
        each = math.prod(parameter.value.shape) / max(log_alpha.size, 1)
        return each * jnp.sum(jax.nn.sigmoid(log_alpha - _BETA * math.log(-_LOW / _HIGH)))

    asked = spelled("hard_concrete", where=where, per=per, stack=stack or None)
    method = LeafMethod(check_prunable, init, update, penalty)
    return compression_of(method, where, stack=stack, asked=asked)
