"""Candidates as tables of a recipe file, and recipes of them as text."""

import json
from collections.abc import Mapping
from typing import Any

from jaxopt_compress.compression import Compression
from jaxopt_compress.planning import Allocation
from jaxopt_compress.planning.recipe import read_methods

Candidate = Compression | Mapping[str, Any]


def default_candidates() -> dict[str, Candidate]:
    """Integers of 2 to 8 bits in groups of 32, and half of the entries pruned with 8 bits."""
    steps = {"group_size": 32, "pad": True, "scale_dtype": "bfloat16"}
    found: dict[str, Candidate] = {
        f"int{bits}": {"quantize": {"format": f"int{bits}", **steps}} for bits in (2, 3, 4, 5, 6)
    }
    found["int8"] = {"quantize": {"format": "int8"}}
    return found | {"half, int8": {"prune": {"sparsity": 0.5}, "quantize": {"format": "int8"}}}


def made(candidates: Mapping[str, Candidate]) -> dict[str, Compression]:
    """Name -> compression.

    Raises:
        ValueError: A table that cannot be read; names the candidate, the method and the key.
    """
    return {
        name: each if isinstance(each, Compression) else read_methods(each, f"candidates[{name!r}]")
        for name, each in candidates.items()
    }


def as_toml(recipe: Allocation, candidates: Mapping[str, Candidate]) -> str:
    """A recipe as the text of a file for `read_recipe`.

    Raises:
        ValueError: A candidate was given as a compression, which is no text.
    """
    names = {recipe.choices[row]: None for row in recipe.choices}
    rules = []
    for name, globs in zip((n for n in names if n != "dense"), recipe, strict=True):
        each = candidates[name]
        if isinstance(each, Compression):
            raise ValueError(
                f"the candidate {name!r} is a Compression, which has no text; give it as a table "
                "of a recipe file, such as {'quantize': {'format': 'int8'}}"
            )
        lines = [f"where = {_value(list(globs))}", *(f"{k} = {_value(v)}" for k, v in each.items())]
        rules.append("\n".join(["[[rule]]", *lines]) + "\n")
    return "\n".join(rules)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        # TOML has no null; where arguments may be None, that is their default.
        given = {str(k): v for k, v in value.items() if v is not None}
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in given.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
