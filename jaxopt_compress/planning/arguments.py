"""Calling functions with arguments from a file, by the types that their signatures give."""

import difflib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxopt_compress.numerics import bounds
from jaxopt_compress.numerics.bounds import Bounds
from jaxopt_compress.planning.budgets import traffic
from jaxopt_compress.quantization import activations, backward
from jaxopt_compress.quantization.activations import Activations, Backward
from jaxopt_compress.tree.budgets import Bytes, bytes, flops

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_BOUNDS = {
    function.__name__: function
    for function in (
        bounds.absmax,
        bounds.entropy,
        bounds.moving_average,
        bounds.mse,
        bounds.percentile,
    )
}


def call(function: Callable[..., Any], table: Mapping[str, Any], name: str, example: str) -> Any:
    """``function(**table)``, each value brought to the type of its parameter.

    Args:
        function: Its ``where`` cannot be given, which rules have.
        table: The arguments.
        name: How errors name the call.
        example: A table that would work.

    Raises:
        ValueError: An unknown or a missing key, a value of another type, or what the function
            itself refuses; names the key and what it takes.
    """
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("where", None)
    check_keys(table, list(parameters), name)
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in table]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, such as {example}")
    hints = typing.get_type_hints(function)
    values = {key: _value(hints[key], value, f"{name}: {key}") for key, value in table.items()}
    try:
        return function(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def check_keys(table: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    """Refuses keys that there are not.

    Raises:
        ValueError: Names a near one, if there is one, and all that there are.
    """
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]!r}? It takes" if near else "it takes"
            raise ValueError(f"{name}: unknown key {key!r}; {meant} {', '.join(known)}")


def _value(hint: Any, value: object, name: str) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    for kind in kinds:
        # Before strings as they are, so that a format is looked up under the name of its key.
        if (read := _READERS.get(kind)) and type(value) in read.takes:
            return read.make(value, name)
    for kind in kinds:
        # Python takes true for 1, and whole numbers for numbers: only the latter is meant.
        if type(value) is kind or (kind is float and type(value) is int):
            return value
        if typing.get_origin(kind) is typing.Literal:
            if any(type(value) is type(one) and value == one for one in typing.get_args(kind)):
                return value
        if typing.get_origin(kind) is tuple and isinstance(value, list):
            if [type(x) for x in value] == list(typing.get_args(kind)):
                return tuple(value)
    words = [_word(kind) for kind in kinds if kind is not type(None)]
    raise ValueError(f"{name}={value!r}: it is {' or '.join(w for w in words if w)}")


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))} whole numbers"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(json.dumps(one) for one in typing.get_args(kind))
    return _READERS[kind].word if kind in _READERS else _WORDS.get(kind, "")


class _Reader(typing.NamedTuple):
    """How a value is made that is a call in Python."""

    takes: tuple[type, ...]
    make: Callable[[Any, str], Any]
    word: str


def _read_bounds(value: Any, name: str) -> Bounds:
    table = {value: {}} if isinstance(value, str) else value
    check_keys(table, list(_BOUNDS), name)
    if len(table) != 1 or not all(isinstance(own, dict) for own in table.values()):
        raise ValueError(f"{name}={value!r}: it is one name, such as {{mse = {{candidates = 80}}}}")
    [(chosen, own)] = table.items()
    return call(_BOUNDS[chosen], own, f"{name}, {chosen}", "{percentile = {percent = 99.9}}")


def _read_products(function: Callable[..., Any]) -> _Reader:
    def make(value: Any, name: str) -> Any:
        table = {"format": value} if isinstance(value, str) else value
        return call(function, table, name, '{format = "int8"}')

    return _Reader((str, dict), make, "a format, or a table of arguments")


def _read_budget(table: dict[str, Any], name: str) -> Any:
    if {"microseconds", "chip"} & table.keys():
        return call(traffic, table, name, '{microseconds = 100, chip = "tpu v5e"}')
    check_keys(table, [*_BUDGETS, "microseconds", "chip"], name)
    if len(table) != 1:
        raise ValueError(f"{name}={table!r}: it is of one share, such as {{bytes = 0.5}}")
    [(chosen, share)] = table.items()
    return _BUDGETS[chosen](share)


_BUDGETS = {"bytes": bytes, "flops": flops, "traffic": traffic, "share": bytes}

_READERS = {
    Activations: _read_products(activations),
    Backward: _read_products(backward),
    Bytes: _Reader((dict,), _read_budget, "a table of one share, such as {bytes = 0.5}"),
    Bounds: _Reader((str, dict), _read_bounds, f"one of {', '.join(_BOUNDS)}, or a table of one"),
    jax.Array: _Reader((int,), lambda seed, _: jax.random.key(seed), "the seed of a random key"),
}
