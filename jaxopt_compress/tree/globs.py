"""Globs over paths."""

import dataclasses
import fnmatch
import functools
import glob
import re


@dataclasses.dataclass(frozen=True)
class Glob:
    """A glob with a least rank, where a plain string does not say enough.

    In a string the rank follows from the last name: with a wildcard in it, as in ``"**"`` and
    ``"encoder/*"``, a glob takes floating leaves of rank 2 and more, and where uses are given only
    those with a use; without one, as in ``"**/scale"``, it names leaves and takes them at any rank.

    Attributes:
        pattern: The glob.
        min_ndim: Takes the floating leaves of this rank and more that match, whatever uses say; by
            default as for a string.

    Raises:
        ValueError: ``**`` is only a part of a name.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"norm": {"weight": jnp.ones(4)}, "dense": {"weight": jnp.ones((4, 4))}}
        >>> def formats(where):
        ...     small = jc.compress(params, jc.quantize("int8", where=where))
        ...     return [type(small[k]["weight"]).__name__ for k in ("norm", "dense")]
        >>> formats(jc.Glob("**/weight", min_ndim=2))
        ['ArrayImpl', 'QuantizedArray']
        >>> formats("**/weight") == formats(jc.Glob("**", min_ndim=1))
        True
    """

    pattern: str
    min_ndim: int | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise TypeError(f"a glob is a string such as '**/kernel', not {self.pattern!r}")
        if self.min_ndim is not None and type(self.min_ndim) is not int:
            raise TypeError(f"min_ndim={self.min_ndim!r}: it is a rank, such as 1")
        _pieces(self.pattern)

    def __repr__(self) -> str:
        rank = "" if self.min_ndim is None else f", min_ndim={self.min_ndim}"
        return f"Glob({self.pattern!r}{rank})"

    @property
    def names(self) -> bool:
        """Whether the last name has no wildcard, so that the glob names what it takes."""
        return not glob.has_magic(self.pattern.rpartition("/")[2])


def glob_matches(pattern: str, path: str) -> bool:
    """Whether a path fits a glob.

    ``*``, ``?``, ``[abc]``, ``[a-z]`` and ``[!abc]`` stay within one name, ``**`` stands for any
    number of names; ``[[]`` is a bracket. The time is at most the product of the two lengths.

    Raises:
        ValueError: ``**`` is only a part of a name.

    Example:
        >>> glob_matches("**/kernel", "decoder/mlp/kernel"), glob_matches("**/kernel", "kernel")
        (True, True)
        >>> glob_matches("*/kernel", "decoder/mlp/kernel")
        False
        >>> [name for name in ("0", "1", "2") if glob_matches("[!2]", name)]
        ['0', '1']
    """
    pieces, match = _pieces(pattern), fnmatch.fnmatchcase
    # All positions that a name may be compared with next: nothing is tried twice.
    at = _past_stars(pieces, {0})
    for name in path.split("/"):
        fits = {i for i in at if i < len(pieces) and (pieces[i] == "**" or match(name, pieces[i]))}
        at = _past_stars(pieces, {i if pieces[i] == "**" else i + 1 for i in fits})
    return len(pieces) in at


@functools.lru_cache(maxsize=1024)
def _pieces(pattern: str) -> tuple[str, ...]:
    pieces = tuple(pattern.split("/"))
    for i, piece in enumerate(pieces):
        if "**" in piece and piece != "**":
            left, right = re.split(r"\*{2,}", piece, maxsplit=1)
            apart = [left + "*"] * bool(left) + ["**"] + ["*" + right] * bool(right)
            better = "/".join([*pieces[:i], *apart, *pieces[i + 1 :]])
            raise ValueError(
                f"{pattern!r}: ** stands for whole names and * for a part of one; did you mean "
                f"{better!r}?"
            )
    return pieces


def _past_stars(pieces: tuple[str, ...], at: set[int]) -> set[int]:
    """The positions, and those after a ``**`` that stands for no name."""
    found = set(at)
    for i, piece in enumerate(pieces):
        if i in found and piece == "**":
            found.add(i + 1)
    return found
