"""Reading what `schema` writes: everything is checked, from the description alone."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import CompressedArray
from jaxopt_compress.arrays.fields import bits_of
from jaxopt_compress.arrays.leaf_types import LEAF_TYPES
from jaxopt_compress.storage.checksums import Part, are_whole
from jaxopt_compress.storage.schema import (
    SCALARS,
    Chunk,
    Decoded,
    Entry,
    Outside,
    is_known,
    stored_types,
)
from jaxopt_compress.storage.words import is_native
from jaxopt_compress.typing import Leaf

_OPTIONAL = ("bits", "axis", "impl")


def decode(node: Any, checksums: Any, chunks: Any = None) -> Decoded:
    """Inverts `schema.encode`, with an `Entry` for each array.

    Args:
        node: The description of a tree.
        checksums: Key -> the parts of that array.
        chunks: Key -> where they are, in order, if they are coded.

    Raises:
        ValueError: The description is not one of this version, or contradicts itself; names the
            leaf.
    """
    if not isinstance(checksums, dict):
        raise ValueError(f"checksums {checksums!r}")
    if chunks is not None:
        _check_chunks(chunks, checksums)
    reader = _Reader(checksums, chunks)
    tree = reader.visit(node, "")
    unused = checksums.keys() - reader.keys
    if unused:
        raise ValueError(f"no leaf has the array {min(unused)!r}")
    return Decoded(tree, reader.converted)


class _Reader:
    """A walk through a description, and what was met on it."""

    def __init__(self, checksums: Mapping[str, Any], chunks: Mapping[str, Any] | None):
        self.checksums = checksums
        self.chunks = chunks
        self.keys: set[str] = set()
        self.converted: list[str] = []

    def visit(self, node: Any, path: str) -> Any:
        if node is None:
            return None
        if not isinstance(node, dict):
            _refuse(path, f"{node!r} describes nothing")
        if "dict" in node:
            return self._dict(node, path)
        if "array" in node:
            return self._array(node, path)
        if "leaf" in node:
            return self._leaf(node, path)
        (kind, value), *more = node.items() or [("nothing", None)]
        if not more and kind in ("list", "tuple") and isinstance(value, list):
            items = [self.visit(child, _below(path, i)) for i, child in enumerate(value)]
            return items if kind == "list" else tuple(items)
        if not more and kind == "outside" and isinstance(value, str):
            return Outside(value)
        if not more and kind in SCALARS:
            return _scalar(kind, value, path)
        _refuse(path, f"unknown kind of leaf, described by {sorted(node)}")

    def _dict(self, node: dict[str, Any], path: str) -> dict[Any, Any]:
        _require(set(node) <= {"dict", "was"}, path, f"a dict with {sorted(node)}")
        if "was" in node:
            _require(isinstance(node["was"], str), path, f"was {node['was']!r}")
            self.converted.append(node["was"])
        found = {}
        for key, child in _pairs(node["dict"], path):
            _require(key not in found, path, f"the key {key!r} twice")
            found[key] = self.visit(child, _below(path, key))
        return found

    def _leaf(self, node: dict[str, Any], path: str) -> CompressedArray:
        _require(set(node) == {"leaf", "static", "fields"}, path, f"a leaf with {sorted(node)}")
        name, given, fields = node["leaf"], node["static"], node["fields"]
        if name not in stored_types():
            known = ", ".join(stored_types())
            _refuse(path, f"unknown compressed array {name!r}; this version knows {known}")
        kind = LEAF_TYPES[name]
        for what, own in ((given, kind.static), (fields, kind.data)):
            _require(isinstance(what, dict), path, f"{name} with {what!r}")
            _require(set(what) <= set(own), path, f"{name} has no {sorted(set(what) - set(own))}")
            missing = sorted(set(own) - set(what))
            _require(not missing, path, f"{name} without its {missing}")
        static = {k: _static(k, v, path) for k, v in given.items()}
        data = {k: self.visit(v, _below(path, k)) for k, v in fields.items()}
        for k, x in data.items():
            several = x if isinstance(x, tuple) else (x,)
            good = all(y is None or isinstance(y, (Entry, CompressedArray)) for y in several)
            _require(good, path, f"the field {k} is no array")
        try:
            leaf = kind.type(**data, **static)
            leaf.check()
        except Exception as error:
            # Whatever it is that leaves of other packages say.
            raise ValueError(f"{path!r}: {error}") from error
        return leaf

    def _array(self, node: dict[str, Any], path: str) -> Entry:
        needed = {"array", "shape", "dtype", "kind"}
        missing = sorted(needed - set(node))
        _require(not missing, path, f"an array without its {missing}")
        unknown = sorted(set(node) - {*needed, *_OPTIONAL})
        _require(not unknown, path, f"an array has no {unknown}")
        key, shape, kind = node["array"], node["shape"], node["kind"]
        _require(kind in ("jax", "numpy", "scalar", "key"), path, f"unknown kind of array {kind!r}")
        _require(_are_sizes(shape), path, f"the shape {shape!r}")
        _require(math.prod(shape) < 2**60, path, f"the shape {shape!r}")
        _require(kind != "scalar" or not shape, path, f"a scalar of shape {shape!r}")
        entry = Entry(
            key,
            tuple(shape),
            _dtype(node["dtype"], path),
            kind,
            node.get("bits"),
            node.get("axis"),
            node.get("impl"),
            path,
        )
        _check_words(entry)
        _check_key(entry)
        _require((key is None) == (0 in shape), path, f"the array {key!r} of shape {shape!r}")
        return entry if key is None else self._with_parts(entry)

    def _with_parts(self, entry: Entry) -> Entry:
        key, path = entry.key, entry.path
        _require(isinstance(key, str) and key in self.checksums, path, f"array {key!r} is unknown")
        _require(key not in self.keys, path, f"array {key!r} is that of another leaf, too")
        self.keys.add(str(key))
        found = self.checksums[str(key)]
        good = isinstance(found, list) and all(map(_is_part, found))
        parts = tuple(Part(tuple(a), tuple(n), sum_) for a, n, sum_ in found) if good else ()
        whole = good and are_whole(parts, entry.stored_shape)
        _require(whole, path, f"checksums {found!r} of an array {list(entry.stored_shape)}"[:200])
        if self.chunks is None:
            return dataclasses.replace(entry, parts=parts)
        places = tuple(Chunk(*chunk) for chunk in self.chunks[str(key)])
        _require(len(places) == len(parts), path, f"{len(places)} chunks of {len(parts)} parts")
        return dataclasses.replace(entry, parts=parts, chunks=places)


def _check_chunks(chunks: Any, checksums: Mapping[str, Any]) -> None:
    """Whether chunks are one after the other in each file."""
    good = isinstance(chunks, dict) and chunks.keys() == checksums.keys()
    if not good or not all(
        isinstance(own, list) and all(map(_is_chunk, own)) for own in chunks.values()
    ):
        raise ValueError("chunks of other arrays than there are, or of another form")
    ends: dict[int, int] = {}
    for file, start, size, _ in sorted(chunk for own in chunks.values() for chunk in own):
        if start != ends.get(file, 0):
            raise ValueError(
                f"a chunk from {start} on in file {file}, whose last one ends elsewhere"
            )
        ends[file] = start + size


def _check_words(entry: Entry) -> None:
    """Whether an array of this dtype is stored as it says."""
    bits, axis, dtype, path = entry.bits, entry.axis, entry.dtype, entry.path
    if bits is None:
        _require(is_native(dtype), path, f"{dtype} without bits")
        _require(axis is None, path, f"axis {axis!r} without bits")
        return
    _require(type(bits) is int and 1 <= bits <= 8, path, f"bits {bits!r}")
    narrow = dtype.itemsize == 1 and bits <= bits_of(dtype) and dtype != np.dtype(bool)
    _require(narrow and (bits < 8 or not is_native(dtype)), path, f"{bits} bits of {dtype}")
    if axis is not None:
        good = type(axis) is int and -len(entry.shape) <= axis < 0 and bits < 8
        _require(good and entry.shape[axis] % 8 == 0, path, f"{bits} bits along axis {axis!r}")


def _check_key(entry: Entry) -> None:
    """Whether a random key has data of the shape that its implementation takes."""
    impl, path = entry.impl, entry.path
    _require((entry.kind == "key") == (impl is not None), path, f"{entry.kind} by {impl!r}")
    if impl is not None:
        data = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        try:
            jax.eval_shape(lambda x: jax.random.wrap_key_data(x, impl=impl), data)
        except Exception as error:
            raise ValueError(f"{path!r}: a random key by {impl!r}: {error}") from error


def _scalar(kind: str, value: Leaf, path: str) -> Any:
    _, write, read = SCALARS[kind]
    try:
        scalar = read(value)
        # What was written is known by that it is written so again.
        same = type(write(scalar)) is type(value) and write(scalar) == value
    except (TypeError, ValueError):
        same, scalar = False, None
    _require(same, path, f"the {kind} {value!r}")
    return scalar


def _pairs(items: Any, path: str) -> Iterator[tuple[str | int, Any]]:
    _require(isinstance(items, list), path, f"a dict of {type(items).__name__}")
    for item in items:
        good = isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)
        _require(good, path, "a dict of other things than pairs of keys and nodes")
        yield item[0], item[1]


def _static(name: str, value: Leaf, path: str) -> Any:
    if name == "dtype":
        return _dtype(value, path)
    _require(not isinstance(value, dict), path, f"{name} is {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _dtype(name: Any, path: str) -> np.dtype:
    try:
        dtype = jnp.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.name != name or not is_known(dtype):
        _refuse(path, f"unknown dtype {name!r}: this version of JAX does not have it")
    return dtype


def _are_sizes(x: Leaf) -> bool:
    return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)


def _is_part(x: Leaf) -> bool:
    if not (isinstance(x, list) and len(x) == 3 and _are_sizes(x[0]) and _are_sizes(x[1])):
        return False
    return type(x[2]) is int and 0 <= x[2] < 2**32


def _is_chunk(x: Leaf) -> bool:
    good = isinstance(x, list) and len(x) == 4 and all(type(n) is int and n >= 0 for n in x)
    return good and x[2] > 0 and x[1] + x[2] < 2**60 and x[3] < 2**32


def _below(path: str, key: str | int) -> str:
    return f"{path}/{key}" if path else str(key)


def _require(good: bool, path: str, why: str) -> None:
    if not good:
        _refuse(path, why)


def _refuse(path: str, why: str) -> NoReturn:
    raise ValueError(f"{path or 'the tree'!r}: {why}")
