"""Recipes as TOML: an ordered list of rules, each a place and what to do there."""

import difflib
import inspect
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxopt_compress.compression import Compression, chain
from jaxopt_compress.compression.compress import Recipe
from jaxopt_compress.low_rank import low_rank
from jaxopt_compress.quantization import quantize
from jaxopt_compress.sparsity import prune, schedules, scores
from jaxopt_compress.tree import Where, select


class Rule(NamedTuple):
    """One rule of a recipe.

    Attributes:
        where: A glob, or None for the floating leaves of rank 2 and more.
        compression: What to do with the leaves that no earlier rule took.
        needs_values: Whether its ``init`` cannot be checked by shapes alone.
    """

    where: str | None
    compression: Compression
    needs_values: bool = False


def _prune(sparsity: float, pattern: str | None = None, where: Where = None) -> Compression:
    return prune(scores.magnitude(), schedules.constant(sparsity), pattern, where)


_METHODS: dict[str, Callable[..., Compression]] = {
    "low_rank": low_rank,
    "prune": _prune,
    "quantize": quantize,
}


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe for `compress` from a TOML file.

    The file is a list of ``[[rule]]`` tables; a leaf goes to the first whose ``where`` matches.
    The other keys of a rule are methods, chained in the order written, with the arguments of the
    functions of the same name: ``quantize`` (``format``, ``group``, ``symmetric``), ``prune``
    (``sparsity``, ``pattern``; by magnitude) and ``low_rank`` (``rank`` or ``energy``). Without
    ``where`` a rule takes the floating leaves of rank 2 and more.

    Args:
        path: The file.

    Returns:
        A mapping from globs to compressions, in order.

    Raises:
        ValueError: What cannot be read; names the rule, and the nearest key that there is.

    Example:
        >>> import pathlib, tempfile
        >>> text = '''
        ... [[rule]]
        ... where = "**/kernel"
        ... prune = {sparsity = 0.5, pattern = "2:4"}
        ... quantize = {format = "int8"}
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "recipe.toml")
        ...     _ = path.write_text(text)
        ...     list(read_recipe(path))
        ['**/kernel']
    """
    return {rule.where or "**": rule.compression for rule in read_rules(path)}


def read_rules(path: str | os.PathLike[str]) -> list[Rule]:
    """As `read_recipe`, as a list of rules."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not TOML: {error}") from error
    _check_keys(document, ["rule"], name)
    tables = document.get("rule")
    good = isinstance(tables, list) and all(isinstance(t, dict) for t in tables)
    if not tables or not good:
        raise ValueError(f"{name} has no [[rule]] table; a recipe is a list of them")
    rules = [_read_rule(table, f"{name}, rule {i}") for i, table in enumerate(tables, 1)]
    seen: set[str] = set()
    for i, rule in enumerate(rules, 1):
        if (rule.where or "**") in seen:
            raise ValueError(
                f"{name}, rule {i}: an earlier rule has the same where={rule.where or '**'!r}; "
                "write what is to be chained into one rule"
            )
        seen.add(rule.where or "**")
    return rules


def assign(rules: Sequence[Rule], leaves: Mapping[str, Any]) -> dict[str, Rule]:
    """Path -> rule, for the leaves that a rule takes.

    Args:
        rules: In order; the first that matches takes a leaf.
        leaves: Path -> array, of which only shape and dtype are read.

    Raises:
        ValueError: A rule that gets no leaf; names the nearest paths.
        TypeError: A rule that matches a leaf that is no floating array.
    """
    taken: dict[str, Rule] = {}
    for rule in rules:
        chosen = select(dict(leaves), rule.where)
        free = [path for path in chosen if path not in taken]
        if not free:
            raise ValueError(
                f"where={rule.where or '**'!r} gets no leaf, since earlier rules take all of its; "
                "put the narrower rule first"
            )
        taken.update(dict.fromkeys(free, rule))
    return taken


def _read_rule(table: Mapping[str, Any], name: str) -> Rule:
    _check_keys(table, ["where", *_METHODS], name)
    where = table.get("where")
    if where is not None and not isinstance(where, str):
        raise ValueError(f"{name}: where={where!r}; it is one glob, such as '**/kernel'")
    # The rule has chosen already: a leaf that its glob matches is compressed, whatever its rank.
    inner = None if where is None else "**"
    steps = [_step(key, value, inner, name) for key, value in table.items() if key != "where"]
    if not steps:
        raise ValueError(f"{name} does nothing: it needs one of {', '.join(_METHODS)}")
    needs_values = "energy" in table.get("low_rank", {})
    return Rule(where, steps[0] if len(steps) == 1 else chain(*steps), needs_values)


def _step(method: str, arguments: Any, where: Where, name: str) -> Compression:
    name = f"{name}, {method}"
    if not isinstance(arguments, dict):
        raise ValueError(f"{name} = {arguments!r}: write a table, such as {_EXAMPLES[method]}")
    parameters = dict(inspect.signature(_METHODS[method]).parameters)
    del parameters["where"]
    _check_keys(arguments, list(parameters), name)
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, such as {_EXAMPLES[method]}")
    try:
        return _METHODS[method](**arguments, where=where)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


_EXAMPLES = {
    "low_rank": "{rank = 8}",
    "prune": "{sparsity = 0.5}",
    "quantize": '{format = "int8"}',
}


def _check_keys(table: Mapping[str, Any], known: list[str], name: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(
                f"{name}: unknown key {key!r}; did you mean {near[0]!r}? "
                f"There are {', '.join(known)}"
            )
