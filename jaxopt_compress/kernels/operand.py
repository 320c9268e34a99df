"""The operand of a product: a quantized weight as data, and how to multiply by it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxopt_compress.kernels.decoded import layer_of, layer_types
from jaxopt_compress.kernels.forms import on_each_platform
from jaxopt_compress.numerics.codebooks import Codebook
from jaxopt_compress.numerics.codes import levels_of
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.integers import Integers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight in memory, as kernels read it.

    Attributes:
        codes: ``[*batch, K, N]``, or planar words ``[*batch, K * bits / 8, N]``.
        steps: ``[*batch, K / group or 1, N]``, of the type that they are held in.
        outer: ``[*batch, 1, N or 1]``, the float32 steps that those are relative to, or None.
        layer: None; or int32, and codes and steps have an axis of layers in front, or of size 1.
        block: How many consecutive ``k`` are packed together in words; None for codes.
        transposed: Whether the last two axes of codes and steps are the other way round.
    """

    codes: jax.Array
    steps: jax.Array
    outer: jax.Array | None
    layer: jax.Array | None
    block: int | None = dataclasses.field(default=None, metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def stacked(self) -> bool:
        """Whether codes are read out of a stack."""
        return self.layer is not None and self.codes.shape[0] > 1

    def types(self, transposed: bool) -> tuple[Any, Any]:
        """The shapes and types of a layer's codes and steps, transposed or not."""
        return layer_types(self.codes, self.steps, self.layer, transposed != self.transposed)

    def lying(self, transposed: bool) -> "Stored":
        """The same, transposed or not; a layer is cut out of its stack if that moves axes."""
        if transposed == self.transposed:
            return self
        own = lambda a: (a if self.layer is None else layer_of(a, self.layer)).mT
        moved = {"codes": own(self.codes), "steps": own(self.steps), "layer": None}
        return dataclasses.replace(self, **moved, transposed=transposed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """A quantized weight, the second factor of a product of matrices.

    Its entries are ``(level(codes) - zero) * scale``.

    Attributes:
        codes: ``[*batch, K, N]`` codes, or planar words ``[*batch, K * bits / 8, N]``, uint8.
        scale: ``[*batch, K / group or 1, N or 1]``, floating point.
        zero: Integer zero points of the shape of ``scale``, or None.
        held: The same weight in memory, if kernels may read it; or None.
        format: The name of its number format.
        group: How many consecutive ``k`` share a scale; None means all of them.
        block: How many consecutive ``k`` are packed together in words of signed integers of 1, 2 or
            4 bits; None for codes.
        transposed: Whether ``codes`` are ``[*batch, N, K]``, without groups or words.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.array([[1], [2], [3], [4]], jnp.int8)
        >>> w = Operand(codes, jnp.array([[0.5], [10.0]]), format="int8", group=2)
        >>> w.depth, w.groups
        (4, 2)
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    held: Stored | None = None
    format: str = dataclasses.field(default="int8", metadata={"static": True})
    group: int | None = dataclasses.field(default=None, metadata={"static": True})
    block: int | None = dataclasses.field(default=None, metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def fmt(self) -> Format:
        """The number format."""
        return format_of(self.format)

    @property
    def bits(self) -> int:
        """The bits of one code."""
        return self.fmt.bits

    @property
    def groups(self) -> int:
        """How many scales there are along K."""
        return self.scale.shape[-2]

    @property
    def depth(self) -> int:
        """K."""
        stored = self.codes.shape[-1 if self.transposed else -2]
        return stored if self.block is None else stored * 8 // self.bits

    @property
    def columns(self) -> int:
        """N."""
        return self.codes.shape[-2 if self.transposed else -1]

    @property
    def converts(self) -> bool:
        """Whether levels are the codes' own values, as of integers and of floats of 8 bits."""
        return isinstance(self.fmt.grid, Integers) or jnp.issubdtype(self.codes.dtype, jnp.floating)

    @property
    def middle(self) -> int:
        """The number that kernels subtract from levels: around 0 they lose the least in 16 bits."""
        return 0 if self.zero is None or self.fmt.grid.signed else 2 ** (self.bits - 1)

    def levels(self, codes: jax.Array, rows: int) -> jax.Array:
        """The values that codes stand for, in a product with so many rows."""
        if self.converts:
            return codes
        if rows > 1 or not isinstance(self.fmt.grid, Codebook):
            return levels_of(codes, self.fmt)
        # For one row a lookup in a table takes less time on CPUs than to compute levels.
        table = np.asarray(self.fmt.grid.levels, np.float32)
        lookup = lambda codes: jnp.take(table, codes.astype(jnp.int32), mode="clip")
        return on_each_platform({"cpu": lookup}, lambda codes: levels_of(codes, self.fmt), codes)

    def check(self, x: jax.Array) -> None:
        """Raises ValueError if an activation or a field does not fit."""
        stored = self.codes.shape
        if self.transposed:
            stored = (*stored[:-2], stored[-1], stored[-2])
        if self.block is not None:
            within = self.depth // self.groups
            if self.bits not in (1, 2, 4) or self.block * self.bits % 8 or within % self.block:
                raise ValueError(
                    f"words of {self.bits} bits have blocks of a multiple of {8 // self.bits} that "
                    f"divides the {within} elements of a group, got {self.block}"
                )
        batch, scale = tuple(stored[:-2]), self.scale.shape
        if x.shape[-1] != self.depth or x.shape[:-2] != batch or x.ndim != len(stored):
            raise ValueError(
                f"x of shape {x.shape} does not meet weight of shape {stored}, K = {self.depth}"
            )
        if self.groups != 1 and (self.group is None or self.groups * self.group != self.depth):
            raise ValueError(
                f"scale of shape {scale} does not fit K = {self.depth}, group = {self.group}"
            )
        if scale[-1] not in (1, self.columns) or scale[:-2] != batch:
            raise ValueError(f"scale of shape {scale} does not fit a weight of shape {stored}")
        if self.zero is not None and self.zero.shape != scale:
            raise ValueError(f"zero of shape {self.zero.shape} must have that of scale, {scale}")


class How(NamedTuple):
    """How a product is computed.

    Attributes:
        dtype: Type of the result.
        wide: Type of sums, scales and their products.
        sums: Type that accelerators round sums to before scales multiply them, where all ``k``
            share a scale; None for ``wide``. Then what they keep and add up over devices takes no
            more bytes than a dense product of this type would. CPUs ignore it.
        precision: As in `jax.lax.dot_general`.
        interpret: Whether kernels run step by step, on any device.
    """

    dtype: DTypeLike = jnp.float32
    wide: Any = jnp.float32
    sums: Any = None
    precision: Any = None
    interpret: bool = False
