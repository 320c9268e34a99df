"""Kernels of convolutions as sums of products of three vectors."""

import jax
import jax.numpy as jnp

from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.low_rank.low_rank import ELSEWHERE
from jaxopt_compress.low_rank.tucker import (
    TuckerState,
    as_three_way,
    channels_of,
    parts_of,
    sizes_of,
)
from jaxopt_compress.numerics.cp import cp3
from jaxopt_compress.tree import Where


@answers(ELSEWHERE)
def cp(
    rank: int | None = None,
    where: Where = None,
    *,
    ratio: float | None = None,
    rounds: int = 100,
    key: jax.Array | None = None,
    inputs: int | None = None,
    stack: int = 0,
) -> Compression:
    r"""Replaces kernels of convolutions by a pointwise, a depthwise and a pointwise convolution.

    .. math:: W_{hwio} \approx \sum_r A_{ir} C_{hwr} B_{ro}

    This is the canonical polyadic decomposition of a kernel whose window is one axis, found by
    alternating least squares. Under `lift` the middle one has the window and strides of the kernel
    and meets each channel by itself. A window apart in its two directions would save little beside
    the pointwise ones, and lose more.

    Args:
        rank: The channels in between, which may be more than the kernel has. Or
        where: Which parameters, as in `tucker`.
        ratio: how many times smaller than a kernel its parts are at least.
        rounds: How often each part is solved for.
        key: The random key of the first guess; by default a fixed one.
        inputs: As in `tucker`.
        stack: As in `low_rank`.

    Returns:
        A `Compression` that stores `TuckerArray` with a depthwise core.

    Raises:
        ValueError: Not one of ``rank`` and ``ratio`` given, or out of range; or as `tucker`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 16, 32))}
        >>> jc.compress(params, jc.cp(rank=8, rounds=5), layout="in,out")["kernel"]
        TuckerArray(cp 8, float32[3,3,16,32], 3.17 bits per weight, 1,824 bytes)

    References:
        Lebedev et al., 2015, Speeding-up Convolutional Neural Networks Using Fine-tuned
        CP-Decomposition.
    """
    given = {k: v for k, v in (("rank", rank), ("ratio", ratio)) if v is not None}
    if len(given) != 1:
        raise ValueError(f"give one of rank and ratio, not {given or 'none'}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}; a rank is at least 1")
    if ratio is not None and not ratio >= 1:
        raise ValueError(f"ratio={ratio}; it is how many times smaller a kernel gets, at least 1")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; it is at least 1")

    def rank_of(parameter: Parameter) -> int:
        if rank is not None:
            return rank
        s, i, o = sizes_of(parameter, channels_of(parameter, inputs))
        assert ratio is not None
        room = int(s * i * o / ratio)
        if room < s + i + o:
            raise ValueError(
                f"ratio={ratio} leaves {room:,} entries for {parameter.describe()}, and rank 1 "
                f"takes {s + i + o:,}; ask for less, or exclude it"
            )
        return room // (s + i + o)

    def check(parameter: Parameter) -> None:
        channels_of(parameter, inputs)
        rank_of(parameter)

    def init(parameter: Parameter) -> Decision:
        channels, dense = channels_of(parameter, inputs), parameter.dense()
        first, core, last = cp3(as_three_way(dense, channels), rank_of(parameter), rounds, key)
        parts = parts_of(dense, channels, first, core[:, None, :], last)
        return Decision(TuckerState(jnp.dtype(dense.dtype), channels, "cp"), parts)

    text = spelled("cp", **given, where=where, rounds=rounds, inputs=inputs, stack=stack or None)
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=text)
