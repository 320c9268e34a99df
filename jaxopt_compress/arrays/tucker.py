"""The kernel of a convolution as three smaller ones, one after the other."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, describe, is_compressed, materialize
from jaxopt_compress.arrays.fields import check_axis, pad_spec
from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.typing import Leaf


@compressed_array(data=["first", "core", "last"], static=["dtype", "axes"])
class TuckerArray(CompressedArray):
    """``w[.., i, o] = sum_ab first[i, a] core[.., a, b] last[b, o]``.

    A convolution runs it as one of size 1 to fewer channels, one with the core, and one of size 1
    to the outputs. A core with one input channel and several outputs meets each channel by itself,
    as in a depthwise convolution: ``w[.., i, o] = sum_a first[i, a] core[.., 0, a] last[a, o]``,
    which is a canonical polyadic (CP) decomposition.

    Attributes:
        first: Of the rank of the dense array: its input channels, and in the place of its output
            channels those of the core's inputs; of size 1 along all other axes but stacks. An array
            or a compressed one, as the others.
        core: As the dense array, with fewer input and output channels; or with one input channel,
            and an output channel for each of ``first``.
        last: As ``first``, from the core's output channels to those of the dense array.
        dtype: The floating dtype of the dense array.
        axes: The negative axes of its input and its output channels.
    """

    first: Leaf
    core: Leaf
    last: Leaf
    dtype: np.dtype
    axes: tuple[int, int]

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the core, with the channels of the other two.

        Raises:
            ValueError: They do not fit each other.
        """
        i, o = self.axes
        first, core, last = (tuple(x.shape) for x in (self.first, self.core, self.last))
        ndim = len(core)
        fits = len(first) == len(last) == ndim and ndim >= -min(self.axes)
        inner = core[o] if fits and core[i] == 1 < first[o] else (core[i] if fits else 0)
        fits = fits and (first[o], last[i]) == (inner, core[o])
        others = [d for d in range(-ndim, 0) if d not in self.axes]
        if not fits or any(x[d] not in (1, core[d]) for x in (first, last) for d in others):
            raise ValueError(
                f"the parts {first}, {core} and {last} of a TuckerArray of axes {self.axes} do not "
                "fit: only leading axes can be mapped over or scanned (in_axes=0)"
            )
        return tuple({i: first[i], o: last[o]}.get(d, core[d]) for d in range(-ndim, 0))

    @property
    def depthwise(self) -> bool:
        """Whether the core meets each channel by itself."""
        i, o = self.axes
        return self.core.shape[i] == 1 < self.first.shape[o]

    @property
    def ranks(self) -> tuple[int, int]:
        """The channels that the core meets, and those that it makes."""
        i, o = self.axes
        return self.first.shape[o], self.last.shape[i]

    def check(self) -> None:
        """As in every compressed array."""
        for axis in self.axes:
            check_axis(axis, len(self.core.shape))
        if len(self.axes) != 2 or self.axes[0] == self.axes[1]:
            raise ValueError(f"axes={self.axes}")
        for x in (self, self.first, self.core, self.last):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{x.dtype} where it has to be floating")
        _ = self.shape

    def describe(self) -> str:
        """The channels of the core, and the form of the parts."""
        parts = list(dict.fromkeys(map(describe, (self.first, self.core, self.last))))
        of = "" if parts == ["dense"] else f" of {' and '.join(parts)}"
        if self.depthwise:
            return f"cp {self.ranks[0]}{of}"
        return "tucker {}x{}{}".format(*self.ranks, of)

    def materialize(self) -> jax.Array:
        """The product of the parts, summed in float32 and rounded once to ``dtype``."""
        _ = self.shape
        parts = [x.astype(jnp.float32) for x in materialize((self.first, self.core, self.last))]
        # Sealed off, so that the sums are compiled alone and are the same in every program.
        first, core, last = jax.lax.optimization_barrier(parts)
        i, o = self.axes
        first, last = (jnp.moveaxis(x, (i, o), (-2, -1)) for x in (first, last))
        dense = jnp.moveaxis(core, (i, o), (-2, -1))
        run = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        # The one input channel of a depthwise core stands for each: it is multiplied entrywise.
        inner = first * dense if self.depthwise else run(first, dense)
        dense = run(jax.lax.optimization_barrier(inner), last)
        top = float(jnp.finfo(self.dtype).max)
        return seal(jnp.moveaxis(jnp.clip(dense, -top, top), (-2, -1), (i, o)), self.dtype)

    def specs(self, spec: PartitionSpec) -> "TuckerArray":
        """Each part is split along the axes that it has in common with the dense array."""
        entries = pad_spec(spec, self.ndim)
        i, o = (self.ndim + d for d in self.axes)

        def split(x: Leaf, but: tuple[int, ...]) -> Leaf | PartitionSpec:
            gone = [d in but or n == 1 for d, n in enumerate(x.shape)]
            own = PartitionSpec(*(None if g else e for g, e in zip(gone, entries, strict=True)))
            return x.specs(own) if is_compressed(x) else own

        return self.replace(
            first=split(self.first, (o,)),
            core=split(self.core, (i, o)),
            last=split(self.last, (i,)),
        )

    def factors(self) -> dict[str, Leaf]:
        """The three parts."""
        return {"first": self.first, "core": self.core, "last": self.last}

    def with_factors(self, factors: Mapping[str, Leaf]) -> "TuckerArray":
        """The same product of other parts."""
        return self.replace(**factors)

    def factor_layouts(self, layout: Layout) -> dict[str, Layout]:
        """The outer parts sum over channels alone, the core over whole patches."""
        i, o = self.axes
        rest = tuple(d for d in layout.contracting if d not in (i, o))
        alone = Layout(tuple(sorted((*rest, i))), (o,), layout.stack)
        return {"first": alone, "core": layout, "last": alone}

    def factor_inputs(self, name: str, layout: Layout) -> jax.Array | None:
        """Nothing follows from patches of the input: a matrix that fits none of them."""
        del name, layout
        return jnp.zeros((0, 0))
