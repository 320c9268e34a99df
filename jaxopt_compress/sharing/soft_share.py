"""Soft weight sharing: entries are drawn to a few values that training finds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.numerics.mixtures import (
    Mixture,
    most_likely,
    negative_log_likelihood,
    negative_log_prior,
    spread,
)
from jaxopt_compress.numerics.shared import Books
from jaxopt_compress.sharing.options import Options, check_parameter
from jaxopt_compress.sharing.state import SharedState, as_codes, dense
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shared"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SoftState(LeafState):
    """What was decided for one parameter; means, scales and shares are learned.

    Attributes:
        shared: The component of each entry. Its centroids are the means.
    """

    shared: SharedState
    kind = "soft_share"
    establishes = frozenset({GRID})
    keeps = frozenset({RANK, ZEROS, N_M})

    def _centroids(self, learned: PyTree) -> dict[str, Any]:
        shape = self.shared.codes.shape
        return {"centroids": self.shared.books.centroids(learned["means"][..., None], shape)}

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """Each entry's most likely mean."""
        return self.shared.apply(w, self._centroids(learned))

    def forward(self, w: Leaf, learned: PyTree) -> Any:
        """``w`` as it is: only the penalty draws it to the means."""
        del learned
        return w

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """Components and means; those of a sparse array stay sparse."""
        return self.shared.compress(w, self._centroids(learned), path)


_ELSEWHERE = {
    **dict.fromkeys(("tau", "weight", "lam", "strength"), "write compressed_training(penalty=)"),
    **dict.fromkeys(("k", "n_clusters", "components", "n_components"), "write clusters="),
    **dict.fromkeys(("pi_zero", "mixing"), "write zeros=, the share of zeros at first"),
}


@answers(_ELSEWHERE)
def soft_share(
    clusters: int = 16,
    where: Where = None,
    *,
    zeros: float = 0.9,
    stack: int = 0,
    centroid_dtype: str = "float32",
) -> Compression:
    r"""Draws entries to the means of a mixture of Gaussians, which is trained with them.

    The ``penalty`` is what entries, and precisions :math:`1 / \sigma_k^2`, lack in likelihood,

    .. math::
        -\sum_i \log \sum_k \pi_k \, \mathcal N(w_i \mid \mu_k, \sigma_k^2)
        - \log p(\sigma^{-2}, \pi_0)

    with :math:`\mu_0 = 0` and the priors of the paper: Gamma(5000, 2) of the precision at 0,
    Gamma(250, 0.1) of the others, Beta(5000, 2) of the share at 0. The loss is taken at the entries
    as they are (``view``); ``apply``, and what is stored, has each at its most likely mean. So
    entries at 0 are pruned and others are shared, in one training from a dense network. The paper
    weighs the penalty by 0.005 over the number of examples, in a mean loss. Means, logarithms of
    scales and logits of shares are learned parts, whose optimizer ``compressed_training(...,
    learned=)`` is worth a slower one: Adam at 5e-4 there.

    Args:
        clusters: Components, with the one at 0: 2 to 256.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use. Each, and each entry of a stack, has a mixture of its own.
        zeros: The share of the component at 0 to begin with.
        stack: As in `quantize`.
        centroid_dtype: What holds means in the end: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Returns:
        A `Compression` with learned parts and a penalty, that stores `CodebookArray`.

    Raises:
        ValueError: Options out of range; in ``init``: a parameter without an axis.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.soft_share(3, zeros=0.5)
        >>> params = {"w": jnp.array([[-0.9, 0.1, 1.0, 0.0], [1.0, -1.0, 0.0, 0.0]])}
        >>> c.apply(params, c.init(params))["w"]
        Array([[-1.,  0.,  1.,  0.],
               [ 1., -1.,  0.,  0.]], dtype=float32)

    References:
        Ullrich et al., 2017, Soft Weight-Sharing for Neural Network Compression. Nowlan and Hinton,
        1992, Simplifying Neural Networks by Soft Weight-Sharing.
    """
    if not 2 <= clusters <= 256 or not 0 < zeros < 1:
        raise ValueError(f"clusters={clusters}, zeros={zeros}: 2 to 256, and above 0 and below 1")
    options = Options(
        clusters, "linear", None, 1, 1, "tensor", True, None, 0, centroid_dtype, 0, None
    )

    def decided(learned: dict[str, Any], books: Books, parameter: Parameter) -> Decision:
        w = dense(parameter.value).astype(jnp.float32)
        x = books.members(w)[..., 0]
        # NaN stays visible, as in `share`: the mean of the last component, of the whole book.
        bad = jnp.any(~jnp.isfinite(x), -1, keepdims=True)
        learned = learned | {"means": jnp.where(bad, jnp.nan, learned["means"])}
        codes = jnp.where(bad, clusters - 1, most_likely(x, Mixture(**learned)))
        codes = as_codes(books.codes(codes, w.shape), clusters)
        shared = SharedState(codes, None, books, clusters, True, False, centroid_dtype)
        return Decision(SoftState(shared), learned)

    def init(parameter: Parameter) -> Decision:
        books = options.books(parameter)
        x = books.members(dense(parameter.value).astype(jnp.float32))[..., 0]
        edge = lambda fn: fn(x, -1) if x.size else jnp.zeros(len(x))
        mixture = spread(edge(jnp.min), edge(jnp.max), clusters, zeros)
        return decided(mixture._asdict(), books, parameter)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        del count
        return decided(decision.learned, decision.state.shared.books, parameter)

    def penalty(decision: Decision, parameter: Parameter) -> jax.Array:
        books, mixture = decision.state.shared.books, Mixture(**decision.learned)
        x = books.members(dense(parameter.value).astype(jnp.float32))[..., 0]
        return jnp.sum(negative_log_likelihood(x, mixture) + negative_log_prior(mixture))

    asked = spelled(
        "soft_share",
        clusters,
        where=where,
        zeros=zeros,
        stack=stack or None,
        centroid_dtype=centroid_dtype,
    )
    check = functools.partial(check_parameter, options)
    return compression_of(LeafMethod(check, init, update, penalty), where, stack=stack, asked=asked)
