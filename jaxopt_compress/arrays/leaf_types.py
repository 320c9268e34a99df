"""The kinds of compressed arrays, and the decorator that makes one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax


class LeafType(NamedTuple):
    """A kind of compressed array, as `compressed_array` made it.

    Attributes:
        type: The class.
        data: The names of its fields that are arrays.
        static: The names of the other fields that files hold.
        stored: Whether files hold such arrays.
    """

    type: Any
    data: tuple[str, ...]
    static: tuple[str, ...]
    stored: bool


# By the name that files call them.
LEAF_TYPES: dict[str, LeafType] = {}

Leaf = TypeVar("Leaf")


@dataclass_transform(frozen_default=True, eq_default=True)
def compressed_array(
    data: Sequence[str],
    static: Sequence[str] = (),
    training: Sequence[str] = (),
    stored: bool = True,
) -> Callable[[type[Leaf]], type[Leaf]]:
    """Makes a subclass of `CompressedArray` a frozen dataclass, a pytree node, and a form of files.

    Args:
        data: The fields that are arrays, compressed arrays or None.
        static: The fields that are static: hashable, and never dependent on values.
        training: Static fields with defaults that only training needs. Files do not hold them.
        stored: Whether `save` takes such arrays.

    Raises:
        ValueError: Another class has the name.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_compress.arrays import CompressedArray
        >>> @compressed_array(data=["values"])
        ... class Halved(CompressedArray):
        ...     values: Any
        ...
        ...     shape = property(lambda self: tuple(self.values.shape))
        ...     dtype = property(lambda self: self.values.dtype)
        ...
        ...     def materialize(self):
        ...         return self.values / 2
        >>> Halved(jnp.ones((4, 2)))
        Halved(halved, float32[4,2], 32 bits per weight, 32 bytes)
    """

    def decorate(cls: type[Leaf]) -> type[Leaf]:
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
        jax.tree_util.register_dataclass(cls, list(data), [*static, *training])
        other = LEAF_TYPES.get(cls.__name__)
        named = lambda c: (c.__module__, c.__qualname__)
        if other is not None and named(other.type) != named(cls):
            raise ValueError(
                f"there is a compressed array {cls.__name__} in {other.type.__module__}, and files "
                "know it by that name: give this class another one"
            )
        LEAF_TYPES[cls.__name__] = LeafType(cls, tuple(data), tuple(static), stored)
        return cls

    return decorate
