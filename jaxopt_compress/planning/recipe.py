"""Recipes as TOML: an ordered list of rules, each a place and what to do there."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxopt_compress.compression import Compression, Globs, Recipe, chain
from jaxopt_compress.low_rank import low_rank
from jaxopt_compress.planning.arguments import call, check_keys
from jaxopt_compress.quantization import (
    auto_round,
    awq,
    dorefa,
    gptq,
    hqq,
    lsq,
    progressive,
    quantize,
    smooth_quant,
)
from jaxopt_compress.sharing import share
from jaxopt_compress.sparsity import prune, reconstruct, schedules, scores, sparse_gpt
from jaxopt_compress.sparsity.units import read_pattern
from jaxopt_compress.tree import Glob, select
from jaxopt_compress.typing import Leaf


class Rule(NamedTuple):
    """One rule of a recipe.

    Attributes:
        where: The globs of the leaves that it takes of those that no earlier rule took.
        compression: What to do with them.
        name: How errors name it, such as ``"recipe.toml, rule 2 (where='**/kernel')"``.
        begin: The update from which on all of its methods do what was asked for.
    """

    where: Globs
    compression: Compression
    name: str
    begin: int = 0


def _prune(
    sparsity: float | None = None,
    pattern: str | None = None,
    scope: str | None = None,
    threshold: float | None = None,
) -> Compression:
    if sparsity is None and threshold is None and not read_pattern(pattern).n_m:
        raise ValueError(
            "it needs sparsity or threshold, such as {sparsity = 0.5}, or a pattern that decides, "
            'such as {pattern = "2:4"}'
        )
    schedule = None if sparsity is None else schedules.constant(sparsity)
    return prune(scores.magnitude(), schedule, pattern, scope=scope, threshold=threshold)


_METHODS = {
    "auto_round": (auto_round, '{format = "int4"}'),
    "awq": (awq, '{format = "int4"}'),
    "dorefa": (dorefa, '{format = "odd2"}'),
    "gptq": (gptq, '{format = "int4"}'),
    "hqq": (hqq, '{format = "int4"}'),
    "low_rank": (low_rank, "{rank = 8}"),
    "lsq": (lsq, '{format = "int4"}'),
    "progressive": (progressive, '{0 = {format = "int8"}, 1000 = {format = "int4"}}'),
    "prune": (_prune, "{sparsity = 0.5}"),
    "quantize": (quantize, '{format = "int8"}'),
    "share": (share, "{clusters = 16}"),
    "reconstruct": (reconstruct, "{rounds = 20}"),
    "smooth_quant": (smooth_quant, "{alpha = 0.5}"),
    "sparse_gpt": (sparse_gpt, "{sparsity = 0.5}"),
}


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe for `compress` from a TOML file.

    The file is a list of ``[[rule]]`` tables. ``where`` is a glob or a list of globs, by default
    ``"**"``, and ``min_ndim`` the least rank, both as in `Glob`; a leaf goes to the first rule that
    takes it. The other keys of a rule are methods, chained in the order written, with the arguments
    of the functions of the same name: `quantize`, `lsq`, `dorefa`, `gptq`, `awq`, `hqq`,
    `auto_round`, `smooth_quant`, `sparse_gpt`, `reconstruct`, `low_rank`, `share`, ``prune``
    (``sparsity``, ``pattern``, ``scope``, ``threshold``; by magnitude) and ``progressive`` (update
    -> arguments of `quantize`).
    Arguments that are calls in Python are their names, or tables of names and arguments:
    ``bounds = "mse"``, ``bounds = {percentile = {percent = 99.9}}``,
    ``activations = {format = "uint4", step = "learned"}``. A random ``key`` is its seed.

    Args:
        path: The file.

    Returns:
        A mapping from globs to compressions, in order.

    Raises:
        ValueError: What cannot be read; names the rule, its globs, the method and the key, and what
            there is.

    Example:
        >>> import pathlib, tempfile
        >>> text = '''
        ... [[rule]]
        ... where = ["**/kernel", "head/[01]/weight"]
        ... prune = {sparsity = 0.5, pattern = "2:4"}
        ... quantize = {format = "int8", bounds = "mse"}
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "recipe.toml")
        ...     _ = path.write_text(text)
        ...     list(read_recipe(path))
        [('**/kernel', 'head/[01]/weight')]
    """
    return {rule.where: rule.compression for rule in read_rules(path)}


def read_rules(path: str | os.PathLike[str]) -> list[Rule]:
    """As `read_recipe`, as a list of rules."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not TOML: {error}") from error
    for key in document:
        if key != "rule":
            raise ValueError(
                f"{name}: {key!r} is in no rule; a recipe is a list of [[rule]] tables"
            )
    tables = document.get("rule")
    if isinstance(tables, dict):
        raise ValueError(f"{name}: [rule] is one table, and a recipe is a list: write [[rule]]")
    if not tables or not (isinstance(tables, list) and all(isinstance(t, dict) for t in tables)):
        raise ValueError(f"{name} has no [[rule]] table; a recipe is a list of them")
    rules = [_read_rule(table, f"{name}, rule {i}") for i, table in enumerate(tables, 1)]
    seen: set[Globs] = set()
    for rule in rules:
        if rule.where in seen:
            raise ValueError(
                f"{rule.name}: an earlier rule has the same where; write what is to be chained "
                "into one rule"
            )
        seen.add(rule.where)
    return rules


def assign(rules: Sequence[Rule], leaves: Mapping[str, Leaf]) -> dict[str, Rule]:
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
        chosen = select(dict(leaves), rule.where, f"{rule.name}: where")
        free = [path for path in chosen if path not in taken]
        if not free:
            raise ValueError(
                f"{rule.name} gets no leaf, since earlier rules take all of its; put the narrower "
                "rule first"
            )
        taken.update(dict.fromkeys(free, rule))
    return taken


def _read_rule(table: Mapping[str, Any], name: str) -> Rule:
    check_keys(table, ["where", "min_ndim", *_METHODS], name)
    given = table.get("where", "**")
    name = f"{name} (where={given!r})"
    where = _read_globs(given, table.get("min_ndim"), name)
    methods = {key: value for key, value in table.items() if key in _METHODS}
    compression = read_methods(methods, name)
    begin = max(_begin(key, value) for key, value in methods.items())
    return Rule(where, compression, name, begin)


def read_methods(table: Mapping[str, Any], name: str) -> Compression:
    """The methods of a rule, chained in the order written.

    Args:
        table: Method -> arguments.
        name: How errors name the table.

    Raises:
        ValueError: What `read_recipe` raises for a rule.
    """
    check_keys(table, list(_METHODS), name)
    if not table:
        raise ValueError(f"{name} does nothing: it needs one of {', '.join(_METHODS)}")
    steps = [_read_step(key, value, f"{name}, {key}") for key, value in table.items()]
    return steps[0] if len(steps) == 1 else chain(*steps)


def _read_globs(given: Any, min_ndim: Any, name: str) -> Globs:
    several = isinstance(given, list)
    globs = given if several else [given]
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"{name}: it is a glob, such as '**/kernel', or a list of them")
    try:
        checked = [Glob(glob, min_ndim) for glob in globs]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    parts = globs if min_ndim is None else checked
    return tuple(parts) if several else parts[0]


def _read_step(method: str, arguments: Any, name: str) -> Compression:
    function, example = _METHODS[method]
    if not isinstance(arguments, dict):
        raise ValueError(f"{name} = {arguments!r}: write a table, such as {example}")
    if function is not progressive:
        return call(function, arguments, name, example)
    stages = {}
    for update, own in arguments.items():
        if not update.isdecimal() or not isinstance(own, dict):
            raise ValueError(f"{name}: it maps updates to tables, such as {example}")
        stages[int(update)] = call(quantize, own, f"{name}, {update}", _METHODS["quantize"][1])
    try:
        return progressive(stages)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _begin(method: str, arguments: Mapping[str, Any]) -> int:
    """The update from which on a method does all that was asked for."""
    if method == "progressive":
        return max(map(int, arguments))
    return arguments.get("begin", 0)
