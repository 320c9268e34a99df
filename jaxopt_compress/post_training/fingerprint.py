"""A hash of everything that a run depends on: values, functions and what they close over."""

import functools
import hashlib
import re
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxopt_compress.arrays.fields import is_key

# The address of an object, in its text.
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def fingerprint(*parts: object) -> str:
    """A hash of trees, functions and compressions, the same in every process.

    Functions count by their code, defaults and the values that they close over; so two recipes
    differ if any of their arguments does. Objects of other kinds count by their type and fields.
    """
    digest = hashlib.sha256()
    seen: dict[int, object] = {}
    for part in parts:
        _add(digest, part, seen)
    return digest.hexdigest()


def _add(digest: Any, x: object, seen: dict[int, object]) -> None:
    say = lambda text: digest.update(f"{text}\0".encode())
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        array = np.asarray(jax.random.key_data(x) if is_key(x) else x)
        say(f"array {array.shape} {array.dtype}")
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return
    if isinstance(x, str):
        x = _ADDRESS.sub("", x)
    if x is None or isinstance(x, str | int | float | complex | bytes | np.dtype):
        say(f"{type(x).__name__} {x!r}")
        return
    say(f"{type(x).__module__}.{type(x).__qualname__}")
    if not isinstance(x, list | tuple | dict):
        if id(x) in seen:
            return  # Functions may close over themselves.
        seen[id(x)] = x  # Kept, so that no other object gets its identity.
    children = _children(x)
    say(len(children))  # Where it ends: [[1], 2] is not [[1, 2]].
    for child in children:
        _add(digest, child, seen)


def _children(x: Any) -> Sequence[object]:
    if isinstance(x, types.CodeType):
        # Lines and file names say nothing of what it does.
        return [x.co_code, x.co_names, x.co_varnames, list(x.co_consts)]
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if _is_filled(c)]
        return [x.__module__, x.__qualname__, x.__code__, x.__defaults__, x.__kwdefaults__, *cells]
    if isinstance(x, dict):
        return [y for pair in x.items() for y in pair]
    if isinstance(x, list | tuple):
        return list(x)
    if isinstance(x, set | frozenset):
        return sorted(map(repr, x))
    if isinstance(x, type):
        return [x.__module__, x.__qualname__]
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    if callable(x) and hasattr(x, "__wrapped__"):
        return [x.__wrapped__]
    slots = [n for kind in type(x).__mro__ for n in getattr(kind, "__slots__", ())]
    held = [(n, getattr(x, n)) for n in slots if hasattr(x, n) and n != "__weakref__"]
    return [held, vars(x)] if hasattr(x, "__dict__") else [held]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
