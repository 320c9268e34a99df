"""A weight whose products also round activations, and cotangents in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.base import CompressedArray, describe, is_compressed
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.typing import Leaf


@compressed_array(
    data=["weight", "scale", "offset"],
    static=["format"],
    training=["clipping", "gradients", "residuals"],
)
class InputQuantizedArray(CompressedArray):
    """A weight, and the number format to which activations are rounded when they meet it.

    Stands for the weight: `materialize` knows nothing of activations. In a lifted function,
    products and convolutions with it round their other operand first, and run on codes where both
    formats allow it. In training it also says what their derivatives are taken at; then activations
    may be left as they are.

    Attributes:
        weight: The weight: a `QuantizedArray`, another compressed array, or a dense one.
        scale: Float32 steps of the activations, of the rank of the weight, with one entry for all
            of it or one per entry of leading stack axes; or None: the largest magnitude of each row
            decides at run time.
        format: The name of the activations' number format, such as ``"int8"``; or None, for a
            weight in training: they are not rounded.
        offset: Float32 values that levels of activations count from, of the shape of ``scale``, or
            None for 0; only with ``scale``.
        clipping: Whether the derivative with respect to ``scale`` is that of a clipping value,
            which only activations beyond it move.
        gradients: The name of the number format that cotangents are rounded to in the backward
            pass, for the weight and for the activation; None does not round them.
        residuals: The factors at which derivatives of a product are taken: ``"rounded"``, or the
            ``"unrounded"`` ones.
    """

    weight: Leaf
    scale: Leaf
    format: str | None
    offset: Leaf = None
    clipping: bool = False
    gradients: str | None = None
    residuals: str = "rounded"

    @property
    def lost_when_dense(self) -> str:  # pyright: ignore
        """The effect that a dense form would lack."""
        if self.format is None:
            return ", whose rounded values derivatives are then taken at"
        return ", whose activations are not rounded"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore
        """The dtype of the weight."""
        return jnp.dtype(self.weight.dtype)

    @property
    def fmt(self) -> Format:
        """The activations' number format."""
        if self.format is None:
            raise ValueError("activations that meet this weight are not rounded")
        return format_of(self.format)

    def check(self) -> None:
        """As in every compressed array."""
        if self.format is not None and not isinstance(self.format, str):
            raise ValueError(f"format {self.format!r}")
        if self.format is not None:
            _ = self.fmt
        shape = self.shape
        for x in (self.scale, self.offset):
            if x is None:
                continue
            fits = len(x.shape) == len(shape)
            fits = fits and all(n in (1, m) for n, m in zip(x.shape, shape, strict=True))
            if not fits or x.dtype != np.float32:
                raise ValueError(
                    f"{x.dtype} scales or offsets {tuple(x.shape)} of activations that meet a "
                    f"weight {shape}"
                )
        if self.offset is not None and (
            self.scale is None or tuple(self.offset.shape) != tuple(self.scale.shape)
        ):
            raise ValueError("offsets of activations without scales of that shape")

    def describe(self) -> str:
        """The weight, and the format of the activations."""
        scale = "" if self.scale is None else " with fixed scale"
        offset = "" if self.offset is None else " and offset"
        return f"{describe(self.weight)} x {self.format}{scale}{offset}"

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return self.weight.materialize() if is_compressed(self.weight) else self.weight
