"""Names of leaves, and choosing leaves by name."""

import collections
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed

Where = str | Callable[[str, Any], bool] | Sequence["Where"] | None


class Part(dict[str, Any]):
    """Some leaves of a tree by their paths, of which a pattern may match none."""


def _flatten_part(part: Part) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.DictKey(k), part[k]) for k in part], tuple(part)


jax.tree_util.register_pytree_with_keys(
    Part, _flatten_part, lambda keys, values: Part(zip(keys, values, strict=True))
)


def path_of(keys: tuple[Any, ...]) -> str:
    """``/``-joined names of a pytree key path: ``encoder/layers/0/kernel``.

    Example:
        >>> import jax
        >>> [path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path({"a": [1, 2]})]
        ['a/0', 'a/1']
    """
    return "/".join(jax.tree_util.keystr((k,), simple=True).lstrip(".") for k in keys)


def paths_of(keyed: Sequence[tuple[Any, ...]]) -> list[str]:
    """The paths of a tree's leaves; the value in a Flax variable is named like the variable."""
    paths = [path_of(keys) for keys in keyed]
    parents = collections.Counter(path.rpartition("/")[0] for path in paths)

    def named(keys: tuple[Any, ...], path: str) -> str:
        # A variable holds its value and nothing else; a layer may have a field of that name.
        parent = path.rpartition("/")[0]
        field = len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey)
        alone = field and path == f"{parent}/value" and parents[parent] == 1
        return parent if alone and parent not in paths else path

    return [named(keys, path) for keys, path in zip(keyed, paths, strict=True)]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """``(path, leaf)`` for each leaf, a compressed array being one leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)
    return list(zip(paths_of([keys for keys, _ in flat]), (x for _, x in flat), strict=True))


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps ``fn(path, leaf, ...)`` over the leaves, a compressed array being one leaf."""
    treedef = jax.tree.structure(tree, is_leaf=is_compressed)
    columns = [treedef.flatten_up_to(other) for other in rest]
    rows = zip(named_leaves(tree), *columns, strict=True)
    return treedef.unflatten([fn(path, leaf, *others) for (path, leaf), *others in rows])


def glob_matches(pattern: str, path: str) -> bool:
    """Whether a path fits a glob: ``*`` and ``?`` within one name, ``**`` across any number.

    Example:
        >>> glob_matches("**/kernel", "decoder/mlp/kernel"), glob_matches("**/kernel", "kernel")
        (True, True)
        >>> glob_matches("*/kernel", "decoder/mlp/kernel")
        False
    """
    return re.fullmatch(_regex(pattern), path) is not None


def _regex(pattern: str) -> str:
    parts = []
    for token in re.split(r"((?<![^/])\*\*/|/\*\*$|\*\*|\*|\?)", pattern):
        special = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        parts.append(special.get(token, re.escape(token)))
    return "".join(parts)


def select(tree: Any, where: Where = None, owner: str = "where") -> list[str]:
    """The paths of the leaves that ``where`` chooses.

    Args:
        tree: Any pytree of arrays and compressed arrays.
        where: A glob, a predicate ``(path, leaf) -> bool``, a sequence of these (any may match), or
            None for the floating leaves of rank 2 and more.
        owner: What the error calls the choice.

    Raises:
        ValueError: Nothing is chosen, or nothing by one of a sequence; names the nearest paths.
        TypeError: A chosen leaf is no floating array; names it.

    Example:
        >>> import jax.numpy as jnp
        >>> select({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        ['dense/kernel']
    """
    leaves = named_leaves(tree)
    counts = collections.Counter(path for path, _ in leaves)
    twice = [path for path, n in counts.items() if n > 1]
    if twice:
        raise ValueError(
            f"two leaves have the path {twice[0]!r}: keys that contain '/' are ambiguous; rename "
            "them"
        )
    if not (where is None or isinstance(where, str) or callable(where)):
        for each in where:
            select(tree, each, owner)
    chosen = [(path, leaf) for path, leaf in leaves if _fits(where, path, leaf)]
    if not chosen and not isinstance(tree, Part):
        raise ValueError(f"{owner}={where!r} matches no leaf; {_nearest(where, leaves)}")
    for path, leaf in chosen:
        if not is_float(leaf):
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            shape = tuple(getattr(leaf, "shape", ()))
            raise TypeError(
                f"{owner}={where!r} matches {path!r} of shape {shape} and dtype {dtype}: only "
                "floating leaves can be compressed; exclude it, or choose by a narrower pattern"
            )
    return [path for path, _ in chosen]


def is_float(leaf: Any) -> bool:
    """Whether a leaf is a floating array or stands for one; floats of one byte are codes."""
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and jnp.dtype(leaf.dtype).itemsize > 1


def _fits(where: Where, path: str, leaf: Any) -> bool:
    if where is None:
        return is_float(leaf) and len(leaf.shape) >= 2
    if isinstance(where, str):
        return glob_matches(where, path)
    if callable(where):
        return bool(where(path, leaf))
    return any(_fits(w, path, leaf) for w in where)


def _nearest(where: Where, leaves: list[tuple[str, Any]]) -> str:
    paths = [path for path, _ in leaves]
    if not paths:
        return "the tree has no leaves"
    if where is None:
        return f"there is no floating leaf of rank 2 or more among {', '.join(paths[:8])}"
    wanted = " ".join(_globs(where))
    if not wanted:
        return f"the paths are {', '.join(paths[:8])}{', ...' * (len(paths) > 8)}"
    near = difflib.get_close_matches(wanted.replace("*", ""), paths, n=3, cutoff=0.0)
    return f"the nearest paths are {', '.join(near)}"


def _globs(where: Where) -> list[str]:
    if isinstance(where, str):
        return [where]
    return [] if where is None or callable(where) else [g for w in where for g in _globs(w)]
