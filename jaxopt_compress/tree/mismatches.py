"""Messages about wrong arguments: one line each, however large they are."""

import difflib
import glob
import inspect
import re
from collections.abc import Sequence
from typing import Any

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.tree.globs import glob_matches
from jaxopt_compress.typing import Leaf

_CHOICES = "a glob such as '**/kernel', a list of globs, or a predicate (path, leaf) -> bool"


def kind_of(x: Leaf) -> str:
    """Describes an argument in a few words.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> kind_of(jnp.ones((2, 3))), kind_of(jc.quantize), kind_of({"w": 1}), kind_of("int8")
        ('an array float32[2,3]', 'the function quantize', 'a dict', "'int8'")
    """
    if is_compressed(x):
        return f"a {type(x).__name__}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array {x.dtype}[{','.join(map(str, x.shape))}]"
    if inspect.isroutine(x):
        return f"the function {getattr(x, '__name__', type(x).__name__)}"
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)[:80]
    return f"a {type(x).__name__}"


def no_where(where: Any, owner: str) -> str:
    """The message for a value that cannot choose leaves, such as a mask of optax."""
    if isinstance(where, re.Pattern):
        return (
            f"{owner}= takes no regular expression: write {owner}=lambda path, leaf: "
            f"re.search({where.pattern!r}, path) is not None, or a glob"
        )
    if isinstance(where, bool):
        return f"{owner}={where}: it is {_CHOICES}; leave it out for all weights"
    return (
        f"{owner}= got {kind_of(where)}: it is {_CHOICES}; in the place of a tree of "
        "booleans write what it was made by, such as lambda path, leaf: leaf.ndim > 1"
    )


def no_match(globs: Sequence[str] | None, leaves: Sequence[tuple[str, Any]]) -> str:
    """The message for a choice that takes no leaf.

    Args:
        globs: Its patterns; none for a predicate, and None for the default.
        leaves: The paths and leaves that there are.
    """
    paths = [path for path, _ in leaves]
    if not paths:
        return "matches no leaf; the tree has no leaves"
    if globs is None:
        shown = ", ".join(paths[:8])
        return f"matches no leaf; there is no floating leaf of rank 2 or more among {shown}"
    if not globs:
        return f"matches no leaf; the paths are {', '.join(paths[:8])}{', ...' * (len(paths) > 8)}"
    for pattern in globs:
        left = [path for path in paths if glob_matches(pattern, path)]
        if left:
            return (
                f"matches only {', '.join(left[:4])}{', ...' * (len(left) > 4)}, and takes the "
                "floating leaves of rank 2 and more: name others by their last name, such as "
                f"'**/{left[0].rpartition('/')[2]}', or give min_ndim=1"
            )
        if better := _meant(pattern, paths):
            return f"matches no leaf; did you mean {better!r}?"
        if "{" in pattern:
            return "matches no leaf; braces have no meaning in a glob: write a list of globs"
    wanted = " ".join(globs).replace("*", "")
    near = difflib.get_close_matches(wanted, paths, n=3, cutoff=0.0)
    return f"matches no leaf; the nearest paths are {', '.join(near)}"


def _meant(pattern: str, paths: Sequence[str]) -> str | None:
    """The same pattern as others would write it, if that matches."""
    slashed = pattern.replace(".", "/")
    candidates = [slashed, f"**/{pattern}", f"**/{slashed}", f"{pattern}/**", glob.escape(pattern)]
    return next((c for c in candidates if any(glob_matches(c, path) for path in paths)), None)
