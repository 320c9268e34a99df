"""What every compression must obey: the methods and the chains that the laws are tried on.

A new method joins by one line of `METHODS`, a new order of methods by one of `CHAINS`; the laws are
functions of `tests/compression/laws.py`, where `FACTORS` names the kinds that go
through LAPACK or random numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import jaxopt_compress as jc
from jaxopt_compress.compression import as_compression

Where = Any


class Method(NamedTuple):
    """A compression under test.

    Attributes:
        name: The test's id.
        build: ``build(where) -> Compression``.
        takes: Whether it works for a leaf of a shape; by default for every one.
        needs_values: Whether ``init`` chooses shapes by values, and cannot run under jit.
        scaled: Whether slopes at parameters are others than 0 and those at the view.
        leaves: Names of the laws' shapes, of which each compiles anew; chains share them among
            each other.
    """

    name: str
    build: Callable[[Where], jc.Compression]
    takes: Callable[[tuple[int, ...]], bool] = lambda shape: True
    needs_values: bool = False
    scaled: bool = False
    leaves: tuple[str, ...] = ("even", "stack", "ragged", "scalar", "empty")


def quantize(*args: Any, **kwargs: Any) -> Callable[[Where], jc.Compression]:
    """A builder of `jaxopt_compress.quantize`."""
    return lambda where: jc.quantize(*args, **kwargs, where=where)


def prune(
    sparsity: float, pattern: str | None = None, **kwargs: Any
) -> Callable[[Where], jc.Compression]:
    """A builder of `jaxopt_compress.prune` by magnitude."""
    return lambda where: jc.prune(
        jc.scores.magnitude(), jc.schedules.constant(sparsity), pattern, where, **kwargs
    )


def pruned_at(threshold: float) -> Callable[[Where], jc.Compression]:
    """A builder of `jaxopt_compress.prune` by magnitude, at a threshold."""
    return lambda where: jc.prune(jc.scores.magnitude(), where=where, threshold=threshold)


def grown(rule: Any, pattern: str | None = None) -> Callable[[Where], jc.Compression]:
    """A builder of `jaxopt_compress.prune` with masks that are exchanged at every update."""
    schedule = jc.schedules.constant(0.5, every=1)
    return lambda where: jc.prune(jc.scores.magnitude(), schedule, pattern, where, grow=rule)


def shared(**kwargs: Any) -> Callable[[Where], jc.Compression]:
    """A builder of `jaxopt_compress.share`."""
    return lambda where: jc.share(where=where, **kwargs)


def soft(where: Where) -> jc.Compression:
    """`jaxopt_compress.soft_threshold` with a threshold that prunes."""
    return jc.soft_threshold(where, initial=-1.0)


def low_rank(**kwargs: Any) -> Callable[[Where], jc.Compression]:
    """A builder of `jaxopt_compress.low_rank`."""
    return lambda where: jc.low_rank(**kwargs, where=where)


def corrected(**given: Any) -> Callable[[Where], jc.Compression]:
    """A builder of thin factors beside what is rounded."""
    return lambda where: jc.low_rank_correction(
        jc.quantize("int3", where=where), rank=2, where=where, **given
    )


def chained(*builders: Callable[[Where], jc.Compression]) -> Callable[[Where], jc.Compression]:
    """A builder of a chain of the same leaves."""
    return lambda where: jc.chain(*(build(where) for build in builders))


def has_axes(shape: tuple[int, ...]) -> bool:
    """What can be pruned."""
    return len(shape) >= 1


def is_matrix(shape: tuple[int, ...]) -> bool:
    """What has a contracted axis."""
    return len(shape) >= 2


def in_fours(shape: tuple[int, ...]) -> bool:
    """What can be cut into groups of 4."""
    return len(shape) >= 2 and shape[-2] % 4 == 0


def has_rank_two(shape: tuple[int, ...]) -> bool:
    """What has two factors of rank 2."""
    return len(shape) >= 2 and min(shape) >= 2


def has_factors(shape: tuple[int, ...]) -> bool:
    """What has factors at all."""
    return len(shape) >= 2 and min(shape) >= 1


def recipe(where: Where) -> jc.Compression:
    """A recipe whose first rule is a chain."""
    del where
    return as_compression(
        {"even": chained(prune(0.5), quantize("int8"))(None), "*": jc.quantize("int4")}
    )


METHODS = [
    Method("int8", quantize("int8")),
    Method("int4", quantize("int4")),
    Method("int2", quantize("int2")),
    Method("int8-asymmetric", quantize("int8", symmetric=False)),
    Method("int2-asymmetric", quantize("int2", symmetric=False)),
    Method("int4-grouped", quantize("int4", group_size=4), in_fours),
    Method("int2-grouped-asymmetric", quantize("int2", group_size=4, symmetric=False), in_fours),
    Method("unstructured", prune(0.6), has_axes),
    Method("2:4", prune(0.5, "2:4"), is_matrix),
    Method("3:5", prune(0.4, "3:5"), is_matrix),
    Method("rank", low_rank(rank=2), has_rank_two),
    Method("rank-1", low_rank(rank=1), has_factors),
    Method("energy", low_rank(energy=0.7), has_factors, needs_values=True),
    Method("rank-error", low_rank(error=0.3), has_factors, needs_values=True),
    Method(
        "rank-budget",
        low_rank(budget=jc.bytes(1.0)),
        has_rank_two,
        needs_values=True,
    ),
    Method(
        "low-rank-plus-sparse",
        lambda where: jc.low_rank_plus_sparse(rank=2, sparsity=0.8, where=where),
        has_rank_two,
    ),
    Method("lora", lambda where: jc.lora(rank=2, where=where), has_rank_two),
    Method("tensor-train", lambda where: jc.tensor_train(rank=2, where=where), has_rank_two),
    Method("int3+correction", corrected(rounds=1), has_rank_two),
    Method("factors+int3", corrected(rounds=1, factors_first=True), has_rank_two),
    Method("loftq", corrected(rounds=2), has_rank_two),
    Method("hqq", lambda where: jc.hqq("int3", symmetric=False, where=where)),
    Method("int8-tensor", quantize("int8", per="tensor")),
    Method("global", prune(0.6, scope="global"), has_axes),
    Method("output", prune(0.6, scope="output"), is_matrix),
    Method("block", prune(0.5, "block:3x2"), is_matrix),
    Method("channels", prune(0.5, "channels"), is_matrix),
    Method("straight-through", prune(0.6, backward="straight_through"), has_axes),
    Method("threshold", pruned_at(0.5), has_axes),
    Method("rigl", grown(jc.grow.by_gradient(0.5)), has_axes),
    Method("set", grown(jc.grow.random(jax.random.key(0), 0.5)), has_axes),
    Method("2:4t", prune(0.5, "2:4t"), is_matrix),
    Method("2:4-rigl", grown(jc.grow.by_gradient(0.5), "2:4"), is_matrix),
    Method("snfs", grown(jc.grow.by_momentum(0.5)), has_axes),
    Method("soft-threshold", soft, has_axes),
    Method(
        "hard-concrete",
        lambda where: jc.hard_concrete(jax.random.key(0), where, initial=0.4),
        has_axes,
        scaled=True,
    ),
    Method(
        "variational-dropout",
        lambda where: jc.variational_dropout(jax.random.key(0), where, initial=0.0),
        has_axes,
    ),
    Method("rate-distortion", lambda where: jc.rate_distortion(where=where)),
    Method("share", shared(clusters=4), has_axes),
    Method("soft-share", lambda where: jc.soft_share(4, where), has_axes),
    Method("share-sums", shared(clusters=2, init="density", codebooks=2), has_axes),
    Method("share-channels", shared(clusters=3, init="density", per="channel"), has_axes),
]
CHAINS = [
    Method(
        "prune+int8",
        chained(prune(0.5), quantize("int8", symmetric=False)),
        leaves=("stack", "ragged"),
    ),
    Method(
        "int2+prune",
        chained(quantize("int2", symmetric=False), prune(0.5)),
        leaves=("even", "stack"),
    ),
    Method("2:4+int4", chained(prune(0.5, "2:4"), quantize("int4", 4, symmetric=False)), in_fours),
    Method("int4+2:4", chained(quantize("int4"), prune(0.5, "2:4")), is_matrix),
    Method("prune+2:4", chained(prune(0.3), prune(0.5, "2:4")), is_matrix),
    Method("rank+prune", chained(low_rank(rank=2), prune(0.5)), has_rank_two),
    Method("soft+int8", chained(soft, quantize("int8")), has_axes),
    Method("rank+int4", chained(low_rank(rank=2), quantize("int4")), has_rank_two),
    Method(
        "rank-and-sparse+int8",
        chained(
            lambda where: jc.low_rank_plus_sparse(rank=2, sparsity=0.8, where=where),
            quantize("int8"),
        ),
        has_rank_two,
    ),
    Method(
        "int4+lora",
        chained(quantize("int4"), lambda where: jc.lora(rank=2, where=where)),
        has_rank_two,
    ),
    Method(
        "nested",
        chained(chained(prune(0.5)), chained(quantize("int8"))),
        leaves=("even", "empty"),
    ),
    Method(
        "prune+share",
        chained(prune(0.5), shared(clusters=4, zero=True, centroid_dtype="bfloat16")),
        leaves=("stack", "ragged"),
    ),
    Method("recipe", recipe, leaves=("even", "ragged")),
]
