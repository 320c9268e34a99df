"""Noise on each entry, of which training learns the size: what is mostly noise is pruned."""

import dataclasses
import functools
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
from jaxopt_compress.compression.leaf_states import GRID, N_M, ZEROS
from jaxopt_compress.sparsity.keys import impl_of, key_of, renewed, words_for
from jaxopt_compress.sparsity.state import check_prunable, leading_stack, store_kept
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree

# The fit of the divergence in the paper.
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mask", "words"], meta_fields=["stack", "impl"]
)
@dataclasses.dataclass(frozen=True)
class NoisyState(LeafState):
    """The mask and the noise of one parameter.

    Attributes:
        mask: Booleans, true where an entry is more than noise.
        words: Those of the random key of this step.
        stack: How many leading axes hold parameters of their own.
        impl: The kind of generator.
    """

    mask: Leaf
    words: Leaf
    stack: int
    impl: Any
    kind = "variational_dropout"
    establishes = frozenset({ZEROS})
    keeps = frozenset({ZEROS, N_M, GRID})

    def apply(self, w: Leaf, learned: PyTree) -> MaskedArray:
        """``w`` under the mask, without noise."""
        del learned
        return MaskedArray(materialize(w), self.mask)

    def forward(self, w: Leaf, learned: PyTree) -> jax.Array:
        """``w`` with noise, differentiable with respect to its size too."""
        w = materialize(w)
        noise = jax.random.normal(key_of(self.words, self.impl), w.shape)
        return w + (jnp.exp(0.5 * learned["log_variance"]) * noise).astype(w.dtype)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Leaf:
        """The entries under the mask."""
        del learned, path
        return store_kept(materialize(w), self.mask, self.stack)


def variational_dropout(
    key: jax.Array,
    where: Where = None,
    *,
    threshold: float = 3.0,
    initial: float = -8.0,
    stack: int = 0,
) -> Compression:
    r"""Adds noise to each entry, learns its variance, and prunes entries that are mostly noise.

    .. math:: \hat w = w + \sigma \epsilon, \qquad \alpha = \sigma^2 / w^2

    while training (``view``); ``apply``, and what is stored, are :math:`w` without noise where
    :math:`\log \alpha` is below the threshold, and 0 elsewhere. The ``penalty`` is the divergence
    from a log-uniform prior, in the paper's approximation

    .. math:: \sum k_1 - k_1 \, \sigma(k_2 + k_3 \log \alpha) + \tfrac12 \log(1 + \alpha^{-1})

    whose weight in a mean loss is 1 over the number of examples, once it has been raised from 0.
    The noise is on weights, the same for all examples of a batch.

    Args:
        key: A random key. Each parameter has numbers of its own, and new ones at each update.
        where: As in `prune`.
        threshold: Of :math:`\log \alpha`; 3, as in the paper, for 95% noise.
        initial: Where the logarithm of the variance starts.
        stack: As in `prune`.

    Returns:
        A `Compression` with learned parts, that stores `SparseArray`.

    Raises:
        ValueError: In ``init``: a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.variational_dropout(jax.random.key(0), initial=-2.0)
        >>> params = {"w": jnp.array([[2.0, 0.01]])}
        >>> c.apply(params, c.init(params))["w"]
        Array([[2., 0.]], dtype=float32)

    References:
        Molchanov et al., 2017, Variational Dropout Sparsifies Deep Neural Networks.
    """
    impl = impl_of(key)

    def log_alpha(parameter: Parameter, learned: PyTree) -> jax.Array:
        w = parameter.dense().astype(jnp.float32)
        return learned["log_variance"] - jnp.log(jnp.square(w) + 1e-16)

    def decided(words: jax.Array, stack: int, parameter: Parameter, learned: PyTree) -> Decision:
        mask = log_alpha(parameter, learned) < threshold
        mask = mask if parameter.keep is None else mask & parameter.keep
        return Decision(NoisyState(mask, words, stack, impl), learned)

    def init(parameter: Parameter) -> Decision:
        learned = {"log_variance": jnp.full(parameter.value.shape, initial, jnp.float32)}
        return decided(words_for(key, parameter.path), leading_stack(parameter), parameter, learned)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        del count
        state, learned = decision
        return decided(renewed(state.words, impl), state.stack, parameter, learned)

    def penalty(decision: Decision, parameter: Parameter) -> jax.Array:
        ratio = log_alpha(parameter, decision.learned)
        gap = _K1 - _K1 * jax.nn.sigmoid(_K2 + _K3 * ratio) + 0.5 * jax.nn.softplus(-ratio)
        return jnp.sum(gap)

    asked = spelled("variational_dropout", where=where, stack=stack or None)
    method = LeafMethod(check_prunable, init, update, penalty)
    return compression_of(method, where, stack=stack, asked=asked)
