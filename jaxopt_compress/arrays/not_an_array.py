"""Refusals of arithmetic, which would take codes for parameters."""

from typing import TYPE_CHECKING, NoReturn

import jax

# Advice for arithmetic on a compressed tree.
INSTEAD = (
    "something was computed with the codes as if they were parameters: use "
    "jaxopt_compress.map_dense(fn, tree) in the place of jax.tree.map, or map over the floats of "
    "jaxopt_compress.partition(tree)"
)


class NotAnArray:
    """Refuses to be converted to an array and to be computed with, and says what works instead."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array that it stands for."""
        raise NotImplementedError

    # NumPy's operators leave these to the methods below.
    __array_ufunc__ = None

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(self._refusal())

    def __jax_array__(self) -> NoReturn:
        raise TypeError(self._refusal())

    if not TYPE_CHECKING:  # Type checkers are to find attributes that are not there.

        def __getattr__(self, name: str) -> NoReturn:
            # Only asked for what is not there, or for properties that fail.
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            if hasattr(jax.Array, name) and not hasattr(type(self), name):
                text += f": {self._refusal()}"
            raise AttributeError(text)

    def _refusal(self) -> str:
        return (
            f"a {type(self).__name__} of shape {self.shape} is not an array: pass it as an "
            "argument of a lifted function (jaxopt_compress.lift), or materialize it "
            "(jaxopt_compress.materialize)"
        )


_OPERATORS = "add sub mul truediv floordiv mod pow matmul divmod and or xor lshift rshift".split()


def _refuse(self: NotAnArray, *_: object) -> NoReturn:
    raise TypeError(self._refusal())


for _name in (
    *_OPERATORS,
    *(f"r{name}" for name in _OPERATORS),
    *"getitem neg pos abs invert lt le gt ge float int".split(),
):
    setattr(NotAnArray, f"__{_name}__", _refuse)
