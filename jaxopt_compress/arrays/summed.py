"""The sum of several arrays, each in a form of its own."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, describe, is_compressed, materialize
from jaxopt_compress.arrays.fields import pad_spec
from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.numerics.rounding import promoted, seal
from jaxopt_compress.typing import Leaf


@compressed_array(data=["parts"])
class SumArray(CompressedArray):
    """``parts[0] + parts[1] + ...``, of which products meet each part and are added.

    A matrix that neither form describes well alone is often the sum of two: thin factors and a few
    large entries, few bits and the factors of what they miss, a frozen weight and its adapter.

    Attributes:
        parts: Arrays and compressed arrays of one shape and one floating dtype.
    """

    parts: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parts.

        Raises:
            ValueError: There are none, or they differ.
        """
        shapes = [tuple(x.shape) for x in self.parts]
        if not shapes or any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"a SumArray has parts of the shapes {shapes}, which are one shape: only leading "
                "axes can be mapped over or scanned (in_axes=0)"
            )
        return shapes[0]

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the parts."""
        return jnp.dtype(self.parts[0].dtype)

    def check(self) -> None:
        """As in every compressed array."""
        if type(self.parts) is not tuple:
            raise ValueError(f"parts in a {type(self.parts).__name__}; they are a tuple")
        dtypes = [jnp.dtype(x.dtype) for x in self.parts]
        if len(set(dtypes)) > 1 or not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"parts in {dtypes}; they are of one floating dtype")
        for part in self.parts:
            if is_compressed(part):
                part.check()
        _ = self.shape

    def describe(self) -> str:
        """What the parts are."""
        return " plus ".join(map(describe, self.parts))

    def materialize(self) -> jax.Array:
        """The dense parts, added in float32 or wider, first to last, and rounded once."""
        _ = self.shape
        wide = promoted(self.dtype, jnp.float32)
        # Sealed, so that no product that makes a part is contracted with the sum.
        dense = [seal(materialize(x), self.dtype).astype(wide) for x in self.parts]
        top = float(jnp.finfo(self.dtype).max)  # Parts of both signs may be larger than their sum.
        total = functools.reduce(jnp.add, dense)
        return seal(jnp.clip(total, -top, top), self.dtype)

    def specs(self, spec: PartitionSpec) -> "SumArray":
        """Each part is split as the whole is."""
        whole = PartitionSpec(*pad_spec(spec, self.ndim))
        return self.each(lambda x: x.specs(spec) if is_compressed(x) else whole)

    def each(self, fn: Callable[[Leaf], Leaf]) -> "SumArray":
        """The sum of ``fn`` of each part."""
        return self.replace(parts=tuple(map(fn, self.parts)))

    def factors(self) -> dict[str, Leaf]:
        """The parts by their positions, and the factors of those that have some: ``0.u``, ``1``."""
        found: dict[str, Leaf] = {}
        for i, part in enumerate(self.parts):
            own = part.factors() if is_compressed(part) else {}
            found.update({f"{i}.{name}": x for name, x in own.items()} or {str(i): part})
        return found

    def with_factors(self, factors: Mapping[str, Leaf]) -> "SumArray":
        """The sum of other parts."""

        def part(i: int, old: Leaf) -> Leaf:
            own = {k.partition(".")[2]: x for k, x in factors.items() if _position(k) == i}
            return own[""] if "" in own else old.with_factors(own)

        return self.replace(parts=tuple(part(i, x) for i, x in enumerate(self.parts)))

    def factor_layouts(self, layout: Layout) -> dict[str, Layout]:
        """That of the whole for each part, and those of its factors."""
        found: dict[str, Layout] = {}
        for name in self.factors():
            part, own = self.parts[_position(name)], name.partition(".")[2]
            found[name] = part.factor_layouts(layout)[own] if own else layout
        return found

    def factor_inputs(self, name: str, layout: Layout) -> jax.Array | None:
        """Parts meet what the whole meets."""
        part, own = self.parts[_position(name)], name.partition(".")[2]
        return part.factor_inputs(own, layout) if own else None


def _position(name: str) -> int:
    """Which part a factor's name is about."""
    return int(name.partition(".")[0])
