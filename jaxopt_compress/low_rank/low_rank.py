"""Parameters as products of two thin factors."""

from typing import NamedTuple

import jax
import numpy as np

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import (
    Compression,
    Decision,
    Method,
    NeedsValues,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.method import Decisions, Parameters
from jaxopt_compress.low_rank.ranks import Asked, WholeState, allocated, check_operations, written
from jaxopt_compress.low_rank.reading import reading_of
from jaxopt_compress.low_rank.whitening import WAYS, Whiten, check_whitening, weighed
from jaxopt_compress.numerics.svd import balanced_factors, error_curve
from jaxopt_compress.tree import Bytes, Flops, Traffic, Where
from jaxopt_compress.tree.meshes import on_auto_axes

ELSEWHERE = {
    **dict.fromkeys(("r", "k", "n_components", "lora_rank"), "write rank="),
    **dict.fromkeys(
        ("explained_variance",), "write energy=, the share of the sum of squares to keep"
    ),
    **dict.fromkeys(("compression_ratio",), "write ratio=, or budget=jaxopt_compress.bytes(0.5)"),
    **dict.fromkeys(("tol", "rtol"), "write error=, the largest relative error"),
    **dict.fromkeys(("layers", "target_modules", "targets"), "write where='**/kernel'"),
}


@answers(ELSEWHERE)
def low_rank(
    rank: int | None = None,
    energy: float | None = None,
    where: Where = None,
    *,
    error: float | None = None,
    bytes: int | None = None,
    ratio: float | None = None,
    budget: Bytes | Flops | Traffic | None = None,
    whiten: Whiten = False,
    damping: float = 1e-4,
    key: jax.Array | None = None,
    stack: int = 0,
) -> Compression:
    r"""Replaces parameters by the product of two factors, from a truncated SVD.

    A parameter is read as a matrix from the axes that the function contracts to the others (or the
    other way round), whatever their order; leading stack axes are matrices of their own with
    a common rank. In training
    the factors are what learns: gradients go to them, and the dense parameter stays as it was.

    With ``whiten`` the factors keep the outputs rather than the entries:

    .. math:: \min_{\mathrm{rank}\, r} \mathrm{tr}((W - \hat W)^T H (W - \hat W)),
        \qquad H = E[x x^T]

    which is solved exactly, for each entry of a stack by its own :math:`H`. Energies, errors and
    budgets are then those of the outputs.

    Args:
        rank: The inner dimension; or
        energy: the share of the sum of squares to keep, in ``(0, 1]``; the rank is then chosen per
            parameter in ``init``, which cannot run under jit.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        error: Or the largest relative error of each parameter, in the Frobenius norm; or
        bytes: the most bytes that the factors of one parameter take; or
        ratio: how many times smaller than a parameter its factors are at least; or
        budget: `jaxopt_compress.bytes` of a share of all chosen parameters: ranks go where they
            lose the least, by the sum of the squares of all relative errors, and a parameter whose
            factors would be as large as itself is kept whole. Or `jaxopt_compress.flops` of a share
            of the operations of their products, which ``uses`` tell: kernels that meet many
            positions then get lower ranks. Or `jaxopt_compress.traffic`, of the bytes that a call
            reads, or of the time in which a chip's memory brings them: tables that are only looked
            up then stay whole.
        whiten: What weighs errors: False for nothing, True for the second moments of ``stats``,
            ``"scale"`` for the roots of the mean magnitudes of inputs, or ``"fisher"`` for the
            squared gradients of each input's weights, from `measures.fisher`.
        damping: With ``whiten=True``: the share of its mean diagonal that is added to :math:`H`.
        key: For matrices of 512 by 512 and more with a rank below a fifth: of the projections by
            which their factors are found; by default a fixed one.
        stack: How many leading axes of each are a stack of parameters of their own, whatever uses
            say of them, such as the members of an ensemble under `jax.vmap`.

    Returns:
        A `Compression` that stores `LowRankArray`, in a `PermutedArray` where contracted axes are
        between others.

    Raises:
        ValueError: Not exactly one way to choose a rank given, or out of range; in ``init``:
            a rank above the limit, nothing that is summed over, or stack axes behind others, or a
            budget that is too small.
        NeedsStats: In ``init``: ``whiten`` needs statistics that are not there.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> small = jc.compress(
        ...     {"w": jnp.outer(jnp.arange(6.0), jnp.arange(4.0))}, jc.low_rank(rank=1)
        ... )
        >>> small["w"].u.shape, small["w"].v.shape, small["w"].shape
        ((6, 1), (1, 4), (6, 4))

    References:
        Denton et al., 2014, Exploiting Linear Structure Within Convolutional Networks for Efficient
        Evaluation. Halko et al., 2011, Finding Structure with Randomness. Hsu et al., 2022,
        Language Model Compression with Weighted Low-Rank Factorization. Yuan et al., 2023, ASVD:
        Activation-aware Singular Value Decomposition. Wang et al., 2024, SVD-LLM.
    """
    asked = Asked(rank, energy, error, bytes, ratio, budget)
    asked.check()
    if whiten not in WAYS:
        raise ValueError(f"whiten={whiten!r}; it is one of {', '.join(map(repr, WAYS))}")
    if not damping > 0:
        raise ValueError(f"damping={damping}; it is above 0, such as 1e-4")

    method = _Factors(asked, whiten, damping, key)
    given = {k: v for k, v in asked._asdict().items() if k != "budget"}
    if budget is not None:
        given["budget"] = written(budget)
    text = spelled("low_rank", **given, where=where, whiten=whiten or None, stack=stack or None)
    return compression_of(Method(method.check, method.init), where, stack=stack, asked=text)


class _Factors(NamedTuple):
    """How the factors of parameters are found, as the arguments of `low_rank`."""

    asked: Asked
    whiten: Whiten
    damping: float
    key: jax.Array | None

    def check(self, parameters: Parameters) -> None:
        """Refuses, from shapes alone, what has no such factors."""
        for parameter in parameters.values():
            self.asked.of_shape(parameter, reading_of(parameter))
            check_whitening(self.whiten, parameter)
            if isinstance(self.asked.budget, Flops):
                check_operations(parameter)
        if self.asked.budget is not None:
            # Whether rank 1 of each fits, whatever they lose: before any decomposition.
            readings = {path: reading_of(p) for path, p in parameters.items()}
            allocated(self.asked.budget, parameters, readings, dict.fromkeys(readings, np.zeros(2)))
        for parameter in parameters.values():
            if self.asked.needs_values and is_traced(parameter.dense()):
                [(name, value)] = ((k, v) for k, v in self.asked._asdict().items() if v is not None)
                raise NeedsValues(
                    f"{name}={value} needs the values of {parameter.describe()} to choose a rank: "
                    "run init outside of jit, or give rank="
                )

    def init(self, parameters: Parameters) -> Decisions:
        """The factors, of ranks that are chosen together where they share a budget."""
        readings = {path: reading_of(p) for path, p in parameters.items()}
        if self.asked.budget is None:
            ranks = {path: self.asked.of_shape(p, readings[path]) for path, p in parameters.items()}
            whole: set[str] = set()
        else:
            curve = lambda p: np.asarray(error_curve(self._met(p)[1]))
            curves = {path: on_auto_axes(curve, p) for path, p in parameters.items()}
            ranks = allocated(self.asked.budget, parameters, readings, curves)
            whole = {path for path, r in ranks.items() if r is None}
        # One after the other, so that temporaries exist for one parameter at a time.
        ready = lambda x: x if any(map(is_traced, jax.tree.leaves(x))) else jax.block_until_ready(x)
        return {
            path: Decision(WholeState())
            if path in whole
            else ready(on_auto_axes(self._decide, p, ranks[path]))
            for path, p in parameters.items()
        }

    def _decide(self, parameter: Parameter, chosen: int | None) -> Decision:
        w, met = self._met(parameter)
        r = self.asked.of_values(met) if chosen is None else chosen
        u, v = balanced_factors(w, r, met, self.key)
        return reading_of(parameter).decision(u, v, parameter.value.dtype)

    def _met(self, parameter: Parameter) -> tuple[jax.Array, jax.Array]:
        """The parameter as matrices, and as the errors of its factors are weighed."""
        reading = reading_of(parameter)
        w = reading.matrices(parameter.dense())
        return w, weighed(self.whiten, parameter, reading, w, self.damping)
