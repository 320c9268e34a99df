"""Names of leaves, and choosing leaves by name."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed

Where = str | Callable[[str, Any], bool] | Sequence["Where"] | None


def path_of(keys: tuple[Any, ...]) -> str:
    """``/``-joined names of a pytree key path: ``encoder/layers/0/kernel``.

    The value inside a Flax variable is named like the variable itself.

    Example:
        >>> import jax
        >>> [path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path({"a": [1, 2]})]
        ['a/0', 'a/1']
    """
    names = [jax.tree_util.keystr((k,), simple=True).lstrip(".") for k in keys]
    if len(names) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names = names[:-1]
    return "/".join(names)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """``(path, leaf)`` for each leaf, a compressed array being one leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)
    return [(path_of(keys), leaf) for keys, leaf in flat]


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps ``fn(path, leaf, ...)`` over the leaves, a compressed array being one leaf."""

    def named(keys, *leaves):
        return fn(path_of(keys), *leaves)

    return jax.tree_util.tree_map_with_path(named, tree, *rest, is_leaf=is_compressed)


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
        ValueError: Nothing is chosen; names the nearest paths.
        TypeError: A chosen leaf is no floating array; names it.

    Example:
        >>> import jax.numpy as jnp
        >>> select({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        ['dense/kernel']
    """
    leaves = named_leaves(tree)
    chosen = [(path, leaf) for path, leaf in leaves if _fits(where, path, leaf)]
    if not chosen:
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
    """Whether a leaf is a floating array or stands for one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


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
