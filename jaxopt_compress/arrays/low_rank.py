"""The product of two thin factors."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxopt_compress.arrays.base import CompressedArray, describe, materialize
from jaxopt_compress.arrays.fields import check_length, pad_spec
from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.typing import Leaf


@compressed_array(data=["u", "v"], static=["dtype", "out_ndim"])
class LowRankArray(CompressedArray):
    """``w[*stack, *left, *right] = sum_r u[*stack, *left, r] * v[*stack, r, *right]``.

    Attributes:
        u: ``[*stack, *left, 1, ..., rank]``, with ``out_ndim - 1`` axes of size 1, an array or a
            compressed one.
        v: ``[*stack, 1, ..., rank, *right]``, with one axis of size 1 less than ``left``
            has axes.
        dtype: The floating dtype of the dense array.
        out_ndim: How many axes ``right`` has.
    """

    u: Leaf
    v: Leaf
    dtype: np.dtype
    out_ndim: int = 1

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of ``u`` and of ``v`` without those of size 1 and the rank.

        Raises:
            ValueError: The factors do not fit each other.
        """
        u, v = tuple(self.u.shape), tuple(self.v.shape)
        cut = len(v) - self.out_ndim
        fits = len(u) == len(v) and cut >= 1
        fits = fits and u[cut:] == (*(1,) * (self.out_ndim - 1), v[cut - 1])
        if not fits or any(
            b not in (1, a) for a, b in zip(u[: cut - 1], v[: cut - 1], strict=True)
        ):
            raise ValueError(
                f"the factors {u} and {v} of a LowRankArray with {self.out_ndim} trailing axes do "
                "not fit: only leading axes can be mapped over or scanned (in_axes=0)"
            )
        return (*u[:cut], *v[cut:])

    def check(self) -> None:
        """As in every compressed array."""
        check_length("out_ndim", self.out_ndim)
        for x in (self, self.u, self.v):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{x.dtype} where it has to be floating")
        _ = self.shape

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.u.shape[-1]

    def describe(self) -> str:
        """The rank, and the form of the factors."""
        factors = list(dict.fromkeys((describe(self.u), describe(self.v))))
        of = "" if factors == ["dense"] else f" of {' and '.join(factors)}"
        return f"low rank {self.rank}{of}"

    def factors(self) -> dict[str, Leaf]:
        """The factors ``u`` and ``v``."""
        return {"u": self.u, "v": self.v}

    def with_factors(self, factors: Mapping[str, Leaf]) -> "LowRankArray":
        """The product of other factors."""
        return self.replace(**factors)

    def factor_layouts(self, layout: Layout) -> dict[str, Layout]:
        """``u`` sums over the left axes, ``v`` over the rank; or the other way round."""
        cut = -self.out_ndim
        left = tuple(d for d in range(-self.ndim, cut) if d not in layout.stack)
        right = tuple(range(cut, 0))
        if self._turned(layout):
            return {
                "u": Layout((-1,), left, layout.stack),
                "v": Layout(right, (cut - 1,), layout.stack),
            }
        return {
            "u": Layout(left, (-1,), layout.stack),
            "v": Layout((cut - 1,), right, layout.stack),
        }

    def factor_inputs(self, name: str, layout: Layout) -> jax.Array | None:
        """The factor that comes first meets the inputs themselves, the other one their products."""
        turned = self._turned(layout)
        if (name == "v") == turned:
            return None
        first = materialize(self.v if turned else self.u)
        stack = first.shape[: len(layout.stack)]
        if not turned:
            return first.reshape(*stack, -1, self.rank)
        return jnp.swapaxes(first.reshape(*stack, self.rank, -1), -2, -1)

    def _turned(self, layout: Layout) -> bool:
        """Whether the right axes are those that are summed over."""
        return bool(layout.contracting) and min(layout.contracting) >= -self.out_ndim

    def materialize(self) -> jax.Array:
        """The product of the factors, summed in float32 and rounded once to ``dtype``."""
        _ = self.shape
        u, v = materialize((self.u, self.v))
        return product(u, v, self.dtype, self.out_ndim)

    def specs(self, spec: PartitionSpec) -> "LowRankArray":
        """``u`` is split along stack and left axes, ``v`` along stack and right ones."""
        entries = pad_spec(spec, self.ndim)
        cut, ones = self.ndim - self.out_ndim, (None,) * self.out_ndim
        left = [
            e if n > 1 else None for e, n in zip(entries[:cut], self.v.shape[:cut], strict=True)
        ]
        # v carries the stack axes; where they end is where its sizes stop matching u's.
        u = PartitionSpec(*entries[:cut], *ones)
        v = PartitionSpec(*left[:-1], None, *entries[cut:])

        def nest(x, s):
            return x.specs(s) if isinstance(x, CompressedArray) else s

        return self.replace(u=nest(self.u, u), v=nest(self.v, v))


def product(u: jax.Array, v: jax.Array, dtype: DTypeLike, out_ndim: int) -> jax.Array:
    """The dense array of two factors: summed in float32, rounded once.

    Its operands and its result are sealed off by barriers, so that the sum is compiled alone and is
    the same in every program. Differentiable in both factors.
    """
    shape = (*u.shape[: u.ndim - out_ndim], *v.shape[v.ndim - out_ndim :])
    rank, right = u.shape[-1], math.prod(v.shape[v.ndim - out_ndim :])
    u = u.astype(jnp.float32).reshape(*u.shape[: u.ndim - out_ndim], rank)
    v = v.astype(jnp.float32).reshape(*v.shape[: v.ndim - out_ndim], right)
    # Axes of v that are 1 where u's are not: leading left axes, folded into the rows.
    stack = next((i for i in range(u.ndim - 2) if v.shape[i] != u.shape[i]), u.ndim - 2)
    rows = u.reshape(*u.shape[:stack], math.prod(u.shape[stack:-1]), rank)
    v = v.reshape(*v.shape[:stack], rank, right)
    rows, v = lax.optimization_barrier((rows, v))
    # The bounds keep results finite in dtype, and a product of rank 1, which XLA turns into plain
    # multiplications, from being contracted with a sum that follows.
    top = float(jnp.finfo(dtype).max)
    dense = jnp.clip(jnp.matmul(rows, v, precision=lax.Precision.HIGHEST), -top, top)
    return seal(dense, dtype).reshape(shape)
