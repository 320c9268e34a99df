"""How the rank of a parameter is chosen: as given, by error or by bytes, alone or with others."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.compression import LeafState, Parameter
from jaxopt_compress.compression.leaf_states import GRID, N_M, RANK, ZEROS
from jaxopt_compress.low_rank.reading import Reading
from jaxopt_compress.numerics.rank_budget import Offer, ranks_within
from jaxopt_compress.numerics.svd import error_curve, rank_for_energy, rank_for_error
from jaxopt_compress.tree import Bytes, Flops, Traffic
from jaxopt_compress.typing import Leaf, PyTree


class Asked(NamedTuple):
    """What a rank is chosen by; one of them is given.

    Attributes:
        rank: The rank.
        energy: The share of the sum of squares to keep.
        error: The largest relative error.
        bytes: The most bytes that the factors of one parameter may take.
        ratio: How many times smaller than the parameter its factors are, at least.
        budget: What all parameters together may take, of bytes or operations.
    """

    rank: int | None
    energy: float | None
    error: float | None
    bytes: int | None
    ratio: float | None
    budget: Bytes | Flops | Traffic | None

    def check(self) -> None:
        """Refuses more or less than one, and values out of range.

        Raises:
            TypeError: ``budget`` is something else than a budget.
            ValueError: Anything else.
        """
        given = {k: v for k, v in self._asdict().items() if v is not None}
        if len(given) != 1:
            named = " and ".join(f"{k}={v}" for k, v in given.items()) or "none of them"
            raise ValueError(
                f"give either rank or energy, or one of error, bytes, ratio and budget, not {named}"
            )
        [(name, value)] = given.items()
        if name == "budget":
            if not isinstance(value, Bytes | Flops | Traffic):
                raise TypeError(
                    f"budget={value!r}; there are jaxopt_compress.bytes(0.8), flops(0.8) and "
                    "traffic(0.8)"
                )
            return
        good, what = {
            "rank": (value >= 1, "a rank is at least 1"),
            "energy": (0 < value <= 1, "it is the share of the squares kept, in (0, 1]"),
            "error": (0 <= value < 1, "it is the error relative to the parameter, in [0, 1)"),
            "bytes": (value >= 1, "it is what the factors of a parameter may take, at least 1"),
            "ratio": (value >= 1, "it is how many times smaller a parameter gets, at least 1"),
        }[name]
        if not good:
            raise ValueError(f"{name}={value}; {what}")

    @property
    def needs_values(self) -> bool:
        """Whether ranks depend on values."""
        return self.rank is None and self.bytes is None and self.ratio is None

    def of_shape(self, parameter: Parameter, reading: Reading) -> int | None:
        """The rank of a parameter, from its shape; None if it depends on values.

        Raises:
            ValueError: It is above the limit of the matrix, or no rank fits.
        """
        limit, one = min(reading.rows_and_columns), cost_of_rank(parameter, reading)
        if self.rank is not None:
            if self.rank > limit:
                rows, columns = reading.rows_and_columns
                raise ValueError(
                    f"rank={self.rank} is above the limit {limit} of {parameter.describe()}, read "
                    f"as a matrix of {rows} by {columns}; use a rank of at most {limit}"
                )
            return self.rank
        if self.needs_values:
            return None
        given = f"bytes={self.bytes}" if self.ratio is None else f"ratio={self.ratio}"
        room = self.bytes if self.ratio is None else int(_nbytes(parameter) / self.ratio)
        if one > (room or 0):
            raise ValueError(
                f"{given} leaves {room:,} bytes for {parameter.describe()}, and one rank takes "
                f"{one:,}; ask for less, or exclude it"
            )
        return min(limit, (room or 0) // one)

    def of_values(self, met: jax.Array) -> int:
        """The rank by error or energy, the largest of a stack."""
        if self.energy is not None:
            return int(jnp.max(rank_for_energy(met, self.energy)))
        assert self.error is not None
        return int(jnp.max(rank_for_error(error_curve(met), self.error)))


def cost_of_rank(parameter: Parameter, reading: Reading) -> int:
    """The bytes of one rank, of all entries of a stack."""
    itemsize = jnp.dtype(parameter.value.dtype).itemsize
    return math.prod(reading.stack) * sum(reading.rows_and_columns) * itemsize


def _nbytes(parameter: Parameter) -> int:
    return math.prod(parameter.value.shape) * jnp.dtype(parameter.value.dtype).itemsize


def check_operations(parameter: Parameter) -> None:
    """Refuses a parameter of unknown operations, for a budget of these.

    Raises:
        ValueError: There are no uses, or a loop around it has an unknown length.
    """
    if parameter.flops is None:
        raise ValueError(
            f"budget=jaxopt_compress.flops(...) needs the operations of {parameter.describe()}: "
            "pass uses=jaxopt_compress.uses(fn, params, *args); of loops of unknown length there "
            "are none"
        )


def allocated(
    budget: Bytes | Flops | Traffic,
    parameters: Mapping[str, Parameter],
    readings: Mapping[str, Reading],
    curves: Mapping[str, np.ndarray],
) -> dict[str, int | None]:
    """Path -> rank, or None for a parameter that stays whole, within a budget of all of them.

    The sum of the squares of relative errors is the least.

    Args:
        budget: Of the bytes of these parameters, of the operations of their products, or of the
            bytes that a call reads of them.
        parameters: Path -> parameter.
        readings: Path -> how it is read.
        curves: Path -> relative errors by rank ``[*stack, ranks]``.

    Raises:
        ValueError: Not even rank 1 of each fits.
    """
    offers = []
    for path, parameter in parameters.items():
        squares = np.square(curves[path].astype(np.float64))
        losses = squares.reshape(-1, squares.shape[-1]).sum(0)
        offers.append(Offer(losses, *_costs(budget, parameter, readings[path])))
    most = budget.most if isinstance(budget, Traffic) else None
    if most is None:
        most = (budget.share or 1.0) * sum(offer.whole for offer in offers)
    try:
        ranks = ranks_within(offers, int(most))
    except ValueError as error:
        text = f"low_rank(budget=jaxopt_compress.{written(budget)}): {error}"
        raise ValueError(text) from None
    return dict(zip(parameters, ranks, strict=True))


def _costs(
    budget: Bytes | Flops | Traffic, parameter: Parameter, reading: Reading
) -> tuple[int, int]:
    """What one rank of a parameter costs, and the parameter itself."""
    if isinstance(budget, Flops):
        whole, (rows, columns) = parameter.flops or 0, reading.rows_and_columns
        # Upwards, so that the budget holds.
        return -(-whole * (rows + columns) // (rows * columns)), whole
    # Of a table that is only looked up, a call reads a few rows, in whichever form.
    is_free = isinstance(budget, Traffic) and parameter.flops == 0
    return cost_of_rank(parameter, reading), 0 if is_free else _nbytes(parameter)


def written(budget: Bytes | Flops | Traffic) -> str:
    """A budget as it is written in calls."""
    name = type(budget).__name__.lower()
    if isinstance(budget, Traffic) and budget.share is None:
        return f"{name}(most={budget.most:g})"
    return f"{name}({budget.share:g})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeState(LeafState):
    """A parameter that is stored as it is, since its factors would take as much."""

    kind = "low_rank"
    keeps = frozenset({ZEROS, N_M, RANK, GRID})

    def apply(self, w: Leaf, learned: PyTree) -> Any:
        """The parameter itself."""
        del learned
        return w

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """The parameter itself."""
        del learned, path
        return w
