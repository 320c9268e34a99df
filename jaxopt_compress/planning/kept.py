"""Measurements that are made one after the other, kept in a file as they are made."""

import itertools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxopt_compress.extras import require


class Kept:
    """Measurements in a file, one line of JSON each."""

    def __init__(self, path: Any, key: str):
        self.path, self.key = path and pathlib.Path(path), key
        self.found: dict[tuple[str, str], float] = {}
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # The last line of a run that was killed.
            if entry["key"] == key:
                self.found[entry["row"], entry["candidate"]] = entry["increase"]

    def get(self, row: str, name: str) -> float | None:
        """The measurement of a candidate for a row, if there is one."""
        return self.found.get((row, name))

    def put(self, row: str, name: str, increase: float) -> None:
        """Adds a measurement."""
        if self.path is not None:
            entry = {"key": self.key, "row": row, "candidate": name, "increase": increase}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def in_turns(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Row by row, so that all rows have some measurements when time runs out."""
    turns: dict[str, list[tuple[str, str]]] = {}
    for row, name in pairs:
        turns.setdefault(row, []).append((row, name))
    return [pair for turn in itertools.zip_longest(*turns.values()) for pair in turn if pair]


def tracked(todo: list[tuple[str, str]], progress: bool) -> Iterable[tuple[str, str]]:
    """``todo``, with a bar if progress is wanted."""
    if not progress:
        return todo
    return require("rich.progress", extra="cli").track(todo, "measuring losses")
