"""Matrices as tensor trains."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import MaskedArray, TensorTrainArray, is_compressed
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    NeedsValues,
    Parameter,
    compression_of,
    each,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.leaf_states import RANK
from jaxopt_compress.low_rank.low_rank import ELSEWHERE
from jaxopt_compress.numerics.tensor_train import (
    digits_of,
    largest_ranks,
    tensor_train_of,
    train_size,
)
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree

Digits = tuple[Sequence[int], Sequence[int]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["dtype", "rows", "columns", "cut"],
)
@dataclasses.dataclass(frozen=True)
class TensorTrainState(LeafState):
    """How learned cores make up the matrix; the fields are those of `TensorTrainArray`."""

    dtype: np.dtype
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    cut: tuple[int, int]
    kind = "tensor_train"
    establishes = frozenset({RANK})
    replaces = True

    def apply(self, w: Leaf, learned: PyTree) -> TensorTrainArray:
        """The product of the cores, still apart; ``w`` itself is not used."""
        del w
        cores = tuple(learned[k] for k in sorted(learned, key=int))
        return TensorTrainArray(cores, self.dtype, self.rows, self.columns, self.cut)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> TensorTrainArray:
        """The cores."""
        del path
        return self.apply(w, learned)


class Asked(NamedTuple):
    """What ranks and digits are chosen by, as the arguments of `tensor_train`."""

    rank: int | None
    error: float | None
    ratio: float | None
    shape: Digits | None
    cores: int

    def digits(self, parameter: Parameter) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The digits of rows and of columns.

        Raises:
            TypeError: The parameter is compressed already.
            ValueError: It has other sizes than the digits.
        """
        value = parameter.value
        if is_compressed(value) and not isinstance(value, MaskedArray):
            raise TypeError(
                f"{parameter.describe()} is a {type(value).__name__} and cannot be factorized; "
                "materialize it first"
            )
        sizes = value.shape[-2:]
        if self.shape is None:
            rows, columns = (digits_of(n, self.cores) for n in sizes)
            return rows, columns
        rows, columns = (tuple(map(int, own)) for own in self.shape)
        for name, own, n in (("rows", rows, sizes[0]), ("columns", columns, sizes[1])):
            # A first digit of which the last is not met by any row would be without use.
            if not math.prod(own) >= n > math.prod(own) - math.prod(own[1:]):
                raise ValueError(
                    f"shape={self.shape} has {math.prod(own)} {name}, and {parameter.describe()} "
                    f"has {n}: digits whose product is that, or a little more, such as "
                    f"{digits_of(n, len(own))}, would fit"
                )
        return rows, columns

    def ranks(self, parameter: Parameter) -> list[int] | None:
        """The ranks between cores, from shapes; None if they depend on values.

        Raises:
            ValueError: No rank fits.
        """
        rows, columns = self.digits(parameter)
        limits = largest_ranks(rows, columns)
        bounded = lambda r: [min(r, limit) for limit in limits]
        if self.rank is not None:
            return bounded(self.rank)
        if self.ratio is None:
            return None
        room = math.prod(parameter.value.shape[-2:]) / self.ratio
        fits = lambda r: train_size(rows, columns, bounded(r)) <= room
        if not fits(1):
            raise ValueError(
                f"ratio={self.ratio} leaves {int(room):,} entries for {parameter.describe()}, and "
                f"ranks of 1 take {train_size(rows, columns, bounded(1)):,}; ask for less, or "
                "exclude it"
            )
        low, high = 1, max(limits, default=1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return bounded(low)

    def check(self, parameter: Parameter) -> None:
        """Refuses, from shapes alone, what has no such cores."""
        if self.ranks(parameter) is None and is_traced(parameter.dense()):
            raise NeedsValues(
                f"error={self.error} needs the values of {parameter.describe()} to choose ranks: "
                "run init outside of jit, or give rank="
            )

    def init(self, parameter: Parameter) -> Decision:
        """The cores."""
        rows, columns = self.digits(parameter)
        w = parameter.dense()
        found = tensor_train_of(w, rows, columns, self.ranks(parameter), self.error)
        as_matrix = lambda x: x.reshape(*x.shape[:-4], math.prod(x.shape[-4:-2]), -1)
        learned = {str(k): as_matrix(core) for k, core in enumerate(found)}
        cut = math.prod(rows) - w.shape[-2], math.prod(columns) - w.shape[-1]
        state = TensorTrainState(jnp.dtype(w.dtype), rows[1:], columns[1:], cut)
        return Decision(state, learned)


def _check_matrices(parameters: Mapping[str, Parameter]) -> None:
    """Refuses all at once that are no matrices."""
    problems = [f"{p.describe()} {why}" for p in parameters.values() if (why := _problem(p))]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}: trains need one input and one output axis, behind the axes of "
            "a stack; choose others by where="
        )


def _problem(parameter: Parameter) -> str | None:
    """Why a parameter is no matrix, nor a stack of some; None if it is one."""
    stack, ndim = parameter.layout.stack, len(parameter.value.shape)
    if not all(parameter.value.shape):
        return "is empty"
    if sorted(stack) != list(range(-ndim, len(stack) - ndim)):
        return f"has stack axes {stack} behind others"
    if ndim - len(stack) == 2:
        return None
    layout = parameter.layout
    for name, axes in (("output", layout.output), ("input", layout.contracting)):
        if len(axes) > 1:
            return f"has {len(axes)} {name} axes {axes}"
    return f"has {ndim - len(stack)} axes"


@answers(ELSEWHERE)
def tensor_train(
    rank: int | None = None,
    error: float | None = None,
    where: Where = None,
    *,
    ratio: float | None = None,
    shape: Digits | None = None,
    cores: int = 3,
    stack: int = 0,
) -> Compression:
    r"""Replaces large matrices, such as tables of embeddings, by chains of small ones.

    .. math:: W_{(i_1 \ldots i_d), (j_1 \ldots j_d)} \approx G_1[i_1, j_1] \cdots G_d[i_d, j_d]

    The number of a row is written in digits, that of a column too, and each pair of digits chooses
    a matrix of a core; the entry is the product of these. Under `lift` a lookup multiplies slices
    of cores and a product meets core after core; neither makes the table, unless a product with it
    takes fewer operations. In training the cores learn.

    Args:
        rank: The largest rank between cores. Or
        error: the largest error of each parameter, relative to its norm; ranks are then chosen in
            ``init``, which cannot run under jit. As with `low_rank`, cores may then be larger than
            the parameter; `compress` warns of it. Or
        where: Which parameters: matrices, and stacks of some.
        ratio: how many times smaller than a parameter its cores are at least.
        shape: The digits of rows and of columns, such as ``((32, 31, 31), (8, 6, 8))``. Their
            product may be above the number of rows; the rest is cut off. By default digits that
            are as equal as can be.
        cores: Without ``shape``: how many digits, at least 2.
        stack: As in `low_rank`.

    Returns:
        A `Compression` that stores `TensorTrainArray`.

    Raises:
        ValueError: Not exactly one of ``rank``, ``error`` and ``ratio`` given, or out of range; in
            ``init``: no matrix, or digits that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> table = jax.random.normal(jax.random.key(0), (1000, 64))
        >>> small = jc.compress({"table": table}, jc.tensor_train(rank=8))["table"]
        >>> small
        TensorTrainArray(tensor train 8-8, float32[1000,64], 1.6 bits per weight, 12,800 bytes)
        >>> [core.shape for core in small.cores]
        [(10, 32), (80, 32), (80, 4)]
        >>> jc.lift(lambda p, i: p["table"][i])({"table": small}, jnp.array([3, 999])).shape
        (2, 64)

    References:
        Oseledets, 2011, Tensor-Train Decomposition. Novikov et al., 2015, Tensorizing Neural
        Networks. Hrinchuk et al., 2020, Tensorized Embedding Layers.
    """
    return made("tensor_train", Asked(rank, error, ratio, shape, cores), where, stack)


def made(name: str, asked: Asked, where: Where, stack: int) -> Compression:
    """The compression of either name, after a look at the arguments."""
    rank, error, ratio, shape, cores = asked
    given = {k: v for k, v in (("rank", rank), ("error", error), ("ratio", ratio)) if v is not None}
    if len(given) != 1:
        raise ValueError(f"give one of rank, error and ratio, not {given or 'none'}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}; a rank is at least 1")
    if error is not None and not 0 < error < 1:
        raise ValueError(f"error={error}; it is the error relative to the parameter, in (0, 1)")
    if ratio is not None and not ratio >= 1:
        raise ValueError(f"ratio={ratio}; it is how many times smaller a parameter gets")
    if cores < 2:
        raise ValueError(f"cores={cores}; there are at least 2")
    if shape is not None:
        counts = [len(own) for own in shape]
        two = name == "kronecker"
        if len(counts) != 2 or counts[0] != counts[1] or counts[0] < 2 or (two and counts[0] > 2):
            raise ValueError(
                f"shape={shape}; it is the digits of rows and those of columns, "
                f"{'two' if two else 'as many'} of each, such as ((32, 32), (16, 24))"
            )
        if min(map(min, shape)) < 1:
            raise ValueError(f"shape={shape}; digits are at least 1")
    given |= {"shape": shape} | ({"cores": cores} if name == "tensor_train" else {})
    text = spelled(name, **given, where=where, stack=stack or None)
    method = each(LeafMethod(asked.check, asked.init))

    def check(parameters: Mapping[str, Parameter]) -> None:
        _check_matrices(parameters)
        method.check(parameters)

    return compression_of(method._replace(check=check), where, stack=stack, asked=text)
