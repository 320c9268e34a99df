"""The structure of a checkpoint as JSON: containers, scalars, compressed arrays, array entries.

`docs/checkpoint_format.md` describes what is written here; `decoding` reads it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.arrays.fields import Distances, Packing, bits_of, is_key
from jaxopt_compress.arrays.leaf_types import LEAF_TYPES
from jaxopt_compress.storage.checksums import Part
from jaxopt_compress.storage.words import is_native, words_axis, words_shape
from jaxopt_compress.tree import path_of
from jaxopt_compress.typing import Leaf, PyTree

NAME = "jaxopt-compress"
VERSION = 4
# The version of checkpoints whose arrays are coded.
CODED_VERSION = 5


class Chunk(NamedTuple):
    """Where the coded bytes of a part are.

    Attributes:
        file: The number of the file, that of the process that wrote it.
        start: Where they begin in it.
        size: How many they are.
        crc32: Of them.
    """

    file: int
    start: int
    size: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a checkpoint, without its values.

    Attributes:
        key: Its name among the stored arrays, or None if it is empty and needs no data.
        shape: Its shape.
        dtype: Its dtype.
        kind: ``"jax"``, ``"numpy"``, ``"scalar"`` (of NumPy) or ``"key"`` (of `jax.random`).
        bits: Bits per entry in the words that are stored; None if the file knows the dtype.
        axis: The negative axis along which words run; None if they hold the flattened array.
        impl: The implementation of a random key, else None.
        path: The path of the leaf, for messages.
        parts: The parts that it is stored in, with their checksums, once it is read.
        chunks: Where each of the parts is, if they are coded, once it is read.
        packing: How its words hold codes, if it holds words, before it is written.
    """

    key: str | None
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    bits: int | None = None
    axis: int | None = None
    impl: str | None = None
    path: str = ""
    parts: tuple[Part, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    packing: Packing | Distances | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored array."""
        return self.shape if self.bits is None else words_shape(self.shape, self.bits, self.axis)

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of the stored array."""
        return self.dtype if self.bits is None else np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Outside:
    """A function, such as an activation of a module, of which a file holds the name alone.

    Attributes:
        name: Its name, for messages.
    """

    name: str


class Encoded(NamedTuple):
    """A tree as JSON and the arrays that it names.

    Attributes:
        node: What JSON can hold.
        arrays: Key -> ``(entry, array)``, the array not yet packed.
    """

    node: Any
    arrays: dict[str, tuple[Entry, Leaf]]


class Decoded(NamedTuple):
    """A tree with an `Entry` in the place of each array.

    Attributes:
        tree: Dicts, lists, tuples, None, scalars, compressed arrays and entries.
        converted: Type names of containers that were saved as dicts.
    """

    tree: PyTree
    converted: list[str]


def encode(tree: PyTree) -> Encoded:
    """Describes a tree; see `decoding.decode`.

    Raises:
        TypeError: A leaf, a container's key or a field that has no form in a file; names its path.
        ValueError: A compressed array whose fields do not fit each other; names its path.
    """
    arrays: dict[str, tuple[Entry, Leaf]] = {}
    return Encoded(_encode(tree, "", None, arrays), arrays)


def _encode(x: Leaf, path: str, bits: int | None, arrays: dict[str, tuple[Entry, Leaf]]) -> Any:
    below = lambda name: f"{path}/{name}" if path else str(name)
    if x is None:
        return None
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _encode_array(x, path, bits, arrays)
    if is_compressed(x):
        return _encode_leaf(x, path, bits, arrays)
    if type(x) is dict:
        if len({type(k) for k in x}) > 1:
            raise TypeError(f"cannot save {path or 'the tree'!r}: its keys are of different types")
        return {"dict": [[_key(k, path), _encode(v, below(k), None, arrays)] for k, v in x.items()]}
    if type(x) in (list, tuple):
        items = [_encode(v, below(i), None, arrays) for i, v in enumerate(x)]
        return {type(x).__name__: items}
    for kind, (scalar, write, _) in SCALARS.items():
        if type(x) is scalar:
            return {kind: write(x)}
    return _encode_container(x, path, arrays)


def _encode_container(x: Leaf, path: str, arrays: dict[str, tuple[Entry, Leaf]]) -> Any:
    """Any other pytree node as a dict of its children."""
    children, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if callable(x) and any(not keys for keys, _ in children):
        kind = type(x) if not hasattr(x, "__qualname__") else x
        return {"outside": f"{kind.__module__}.{kind.__qualname__}"}
    if any(not keys for keys, _ in children):
        raise TypeError(
            f"cannot save {path or 'the tree'!r}, a {type(x).__name__}: a checkpoint holds "
            "arrays, compressed arrays, numbers, strings, None, and names of functions; replace it "
            "by None, or save only the arrays of a module (flax.nnx.state, equinox.filter)"
        )
    attr = jax.tree_util.GetAttrKey("value")
    if len(children) == 1 and children[0][0] == (attr,):
        # A Flax variable goes by its own name, as everywhere in paths.
        return _encode(children[0][1], path, None, arrays)
    items = []
    for (key,), child in children:
        name = key.key if isinstance(key, jax.tree_util.DictKey) else path_of((key,))
        below = f"{path}/{name}" if path else str(name)
        items.append([_key(name, path), _encode(child, below, None, arrays)])
    return {"dict": items, "was": f"{type(x).__module__}.{type(x).__qualname__}"}


def _key(key: object, path: str) -> str | int:
    if not isinstance(key, (str, int)):
        raise TypeError(
            f"cannot save the key {key!r} of {path or 'the tree'!r}: keys are strings or integers"
        )
    return key


def _encode_leaf(
    x: Leaf, path: str, bits: int | None, arrays: dict[str, tuple[Entry, Leaf]]
) -> Any:
    name = type(x).__name__
    kind = LEAF_TYPES.get(name)
    if kind is None or kind.type is not type(x) or not kind.stored:
        raise TypeError(
            f"cannot save {path!r}: checkpoints know {', '.join(stored_types())}, not {name}; save "
            "what compress returns, or materialize it"
        )
    try:
        x.check()
    except Exception as error:
        raise ValueError(f"cannot save {path!r}, which could not be loaded: {error}") from error
    widths = x.stored_widths(bits)
    write = lambda k: _encode(getattr(x, k), f"{path}/{k}", widths.get(k), arrays)
    fields = {k: write(k) for k in kind.data}
    for k, packing in x.packings().items():
        key = fields[k].get("array")
        if key is not None:
            entry, words = arrays[key]
            arrays[key] = (dataclasses.replace(entry, packing=packing), words)
    static = {k: _encode_static(getattr(x, k)) for k in kind.static}
    return {"leaf": name, "static": static, "fields": fields}


def stored_types() -> list[str]:
    """The names of compressed arrays that files hold."""
    return sorted(name for name, kind in LEAF_TYPES.items() if kind.stored)


def _encode_static(value: object) -> object:
    if isinstance(value, np.dtype):
        return value.name
    return list(value) if isinstance(value, tuple) else value


def _encode_array(
    x: Leaf, path: str, bits: int | None, arrays: dict[str, tuple[Entry, Leaf]]
) -> dict[str, object]:
    if isinstance(x, Tracer):
        raise TypeError(f"cannot save {path!r} inside of jit: it has no value there")
    kind, impl = "scalar" if isinstance(x, np.generic) else "numpy", None
    if isinstance(x, jax.Array):
        kind = "jax"
    if is_key(x):
        kind, impl, x = "key", str(jax.random.key_impl(x)), jax.random.key_data(x)
    if not is_known(x.dtype):
        raise TypeError(f"cannot save {path!r}: there is no form for the dtype {x.dtype}")
    shape, axis = tuple(x.shape), None
    bits = bits or bits_of(x.dtype)
    if (bits >= 8 and is_native(x.dtype)) or x.dtype == bool:
        bits = None
    elif bits < 8:
        axis = words_axis(x.sharding.shard_shape(shape) if isinstance(x, jax.Array) else shape)
    key = str(len(arrays)) if x.size else None
    entry = Entry(key, shape, np.dtype(x.dtype), kind, bits, axis, impl, path)
    if key is not None:
        arrays[key] = (entry, x)
    node: dict[str, object] = {
        "array": key,
        "shape": list(shape),
        "dtype": x.dtype.name,
        "kind": kind,
    }
    optional = {"bits": bits, "axis": axis, "impl": impl}
    return node | {k: v for k, v in optional.items() if v is not None}


def is_known(dtype: np.dtype) -> bool:
    """Whether there is a form for arrays of this dtype."""
    small = dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.number)
    return is_native(dtype) or small


# Python scalars: their type, how JSON holds them, and how they are read from it. JSON has no
# infinities.
SCALARS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bool": (bool, bool, bool),
    "int": (int, int, int),
    "float": (float, repr, float),
    "complex": (complex, repr, complex),
    "str": (str, str, str),
}
