"""Elementwise operations on constants of which some are not known."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.lift import _compat
from jaxopt_compress.rewriting.coupling.elementwise import ZERO_TO_ZERO
from jaxopt_compress.rewriting.coupling.equations import Node, shape_of
from jaxopt_compress.typing import PyTree, Value

_UNARY = {
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "sin": np.sin, "cos": np.cos,
    "tan": np.tan, "tanh": np.tanh, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1,
    "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt, "square": np.square, "floor": np.floor,
    "ceil": np.ceil, "round": np.round, "cosh": np.cosh, "sinh": np.sinh, "not": np.logical_not,
    "is_finite": np.isfinite, "copy": np.positive, "stop_gradient": np.positive,
    "logistic": lambda x: 1 / (1 + np.exp(-x)), "rsqrt": lambda x: 1 / np.sqrt(x),
    "reduce_precision": np.positive, "sharding_constraint": np.positive, "name": np.positive,
    "convert_element_type": lambda x: x, "erfc": lambda x: 1 if x == 0 else None,
}  # fmt: skip
_BINARY = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "max": np.maximum, "min": np.minimum, "pow": np.power, "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "atan2": np.arctan2,
}  # fmt: skip


class Carried(NamedTuple):
    """In the place of a constant: what a loop carries, unchanged; with its number."""

    number: int


class Lane:
    """In the place of a constant: a value that is the same at all removed indices of an axis.

    It may differ along the other axes, such as minus the mean of a row.
    """


LANE = Lane()
Known: TypeAlias = np.generic | Carried | Lane | None
"""A constant at the removed indices of a value, what stands in its place, or None."""
_ARITHMETIC = frozenset({"add", "add_any", "sub", "mul", "div", "rem", "pow", "atan2"})


def is_zero(x: Value) -> bool:
    """Whether a constant is known, and 0."""
    return x is not None and not isinstance(x, (Carried, Lane)) and bool(x == 0)


def is_infinite(x: Value) -> bool:
    """Whether a constant is known, and infinite or NaN."""
    if x is None or isinstance(x, (Carried, Lane)) or x.dtype.kind in "biu":
        return False
    return not np.isfinite(x)


def apply(node: Node, values: Sequence[Known]) -> Value:
    """The result of an elementwise operation, or None if it is not known.

    Args:
        node: The operation.
        values: Scalars of numpy, None where nothing is known.
    """
    name = node.name
    if any(isinstance(v, Carried) for v in values):
        return _carried(node, values)
    if name == "select_n":
        return _select(values)
    dtype = _compat.type_of(node.eqn.outvars[0]).dtype
    with np.errstate(all="ignore"):
        if all(v is not None for v in values):
            found = _known(name, node.params, values)
        else:
            found = _partly_known(name, values)
        if found is None:
            return None
        return np.asarray(found).astype(dtype)[()]


def _carried(node: Node, values: Sequence[Known]) -> Known:
    """What is carried, where nothing is added to it or it is multiplied by 1."""
    (at,) = [i for i, v in enumerate(values) if isinstance(v, Carried)][:1]
    others = [v for i, v in enumerate(values) if i != at]
    own, out = node.eqn.invars[at], node.eqn.outvars[0]
    same_type = _compat.type_of(own).dtype == _compat.type_of(out).dtype
    if not same_type or shape_of(own) != shape_of(out):
        return None
    adds = node.name in ("add", "add_any") or (node.name == "sub" and at == 0)
    scales = node.name == "mul" or (node.name == "div" and at == 0)
    one = lambda v: v is not None and not isinstance(v, Carried) and bool(v == 1)
    unchanged = (
        node.name in ("copy", "stop_gradient", "name", "convert_element_type")
        or (adds and all(map(is_zero, others)))
        or (scales and all(map(one, others)))
    )
    return values[at] if unchanged else None


def _known(name: str, params: Mapping[str, PyTree], values: Sequence[Value]) -> Value:
    if name in _UNARY:
        if values[0].dtype == bool and name not in ("not", "convert_element_type"):
            return None
        return _UNARY[name](values[0])
    if name in _BINARY:
        integers = np.issubdtype(values[0].dtype, np.integer)
        return None if integers and name in ("div", "pow") else _BINARY[name](*values)
    if name == "integer_pow":
        return values[0] ** params["y"]
    if name == "clamp":
        return np.clip(values[1], values[0], values[2])
    if name in ("and", "or") and values[0].dtype == bool:
        return np.logical_and(*values) if name == "and" else np.logical_or(*values)
    return 0 if name in ZERO_TO_ZERO and values[0] == 0 else None


def _partly_known(name: str, values: Sequence[Value]) -> Value:
    """Products with 0, 0 over what is not known, and NaN, which all arithmetic keeps."""
    zero = list(map(is_zero, values))
    if name in ("add", "sub") and is_infinite(values[0]) and np.isinf(values[0]):
        return values[0]  # since the other is finite
    if name in _ARITHMETIC and any(map(is_infinite, values)):
        return np.nan
    if name in ("mul", "and"):
        return 0 if any(zero) else None
    if name in ("div", "rem"):
        return 0 if zero[0] else None
    return None


def _select(values: Sequence[Value]) -> Value:
    which, *cases = values
    if which is not None:
        return cases[int(which)]
    first = cases[0]
    return first if all(v is not None and v == first for v in cases) else None


def no_numbers(x: Value) -> bool:
    """Whether it is a tracer, spread over processes, or made of keys."""
    if isinstance(x, (np.ndarray, np.generic)):
        return False
    keys = jax.numpy.issubdtype(x.dtype, jax.dtypes.extended)
    return keys or not isinstance(x, jax.Array) or is_traced(x) or not x.is_fully_addressable
