"""Names of leaves, and choosing leaves by name."""

import collections
import enum
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.tree.globs import Glob, glob_matches
from jaxopt_compress.tree.mismatches import no_match, no_where
from jaxopt_compress.typing import Leaf, PyTree

Where = str | Glob | Callable[[str, Any], bool] | Sequence["Where"] | None


class Part(dict[str, Any]):
    """Some leaves of a tree by their paths.

    Attributes:
        may_miss: Whether a pattern may match none of them, since it may match others of the tree.
        named: Where the glob of a recipe has chosen them, those that it named; else None.
    """

    def __init__(
        self,
        leaves: Iterable[tuple[str, Any]] | dict[str, Any],
        may_miss: bool = True,
        named: Collection[str] | None = None,
    ):
        super().__init__(leaves)
        self.may_miss = may_miss
        self.named = None if named is None else frozenset(named)

    def of(self, leaves: dict[str, Any]) -> "Part":
        """Other leaves, such as gradients, as a part of the same kind."""
        return Part(leaves, self.may_miss, self.named)


def _flatten_part(part: Part) -> tuple[list[tuple[Any, Any]], Any]:
    children = [(jax.tree_util.DictKey(k), part[k]) for k in part]
    return children, (tuple(part), part.may_miss, part.named)


def _unflatten_part(static: Any, values: Iterable[Any]) -> Part:
    keys, may_miss, named = static
    return Part(zip(keys, values, strict=True), may_miss, named)


jax.tree_util.register_pytree_with_keys(Part, _flatten_part, _unflatten_part)


def may_miss(tree: PyTree) -> bool:
    """Whether patterns may match nothing, the tree being a part of another one."""
    return isinstance(tree, Part) and tree.may_miss


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


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """``(path, leaf)`` for each leaf, a compressed array being one leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)
    return list(zip(paths_of([keys for keys, _ in flat]), (x for _, x in flat), strict=True))


def map_named(fn: Callable[..., PyTree], tree: PyTree, *rest: Any) -> PyTree:
    """Maps ``fn(path, leaf, ...)`` over the leaves, a compressed array being one leaf."""
    treedef = jax.tree.structure(tree, is_leaf=is_compressed)
    columns = [treedef.flatten_up_to(other) for other in rest]
    rows = zip(named_leaves(tree), *columns, strict=True)
    return treedef.unflatten([fn(path, leaf, *others) for (path, leaf), *others in rows])


class NoLeaf(ValueError):
    """A choice that takes no leaf."""


class Fit(enum.IntEnum):
    """How a leaf fits a choice: not, as one of the weights, or because it is meant itself."""

    NO = 0
    WEIGHT = 1
    NAMED = 2


def select(tree: PyTree, where: Where = None, owner: str = "where") -> list[str]:
    """The paths of the leaves that ``where`` chooses.

    Args:
        tree: Any pytree of arrays and compressed arrays.
        where: A glob, a predicate ``(path, leaf) -> bool``, a sequence of these (any may match), or
            None for ``"**"``. `Glob` says which ranks a glob takes.
        owner: What the error calls the choice.

    Raises:
        NoLeaf: Nothing is chosen, or nothing by one of a sequence; names the nearest paths.
        ValueError: Two leaves have the same path.
        TypeError: ``where`` is something else; or a leaf that it names is not a floating array.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> select(params), select(params, "dense/*"), select(params, "**/bias")
        (['dense/kernel'], ['dense/kernel'], ['dense/bias'])
    """
    return list(fits(tree, where, owner))


def fits(tree: PyTree, where: Where = None, owner: str = "where") -> dict[str, Fit]:
    """As `select`: path -> whether it is one of the weights, or meant itself."""
    leaves = named_leaves(tree)
    counts = collections.Counter(path for path, _ in leaves)
    twice = [path for path, n in counts.items() if n > 1]
    if twice:
        raise ValueError(
            f"two leaves have the path {twice[0]!r}: keys that contain '/' are ambiguous; rename "
            "them"
        )
    _check_where(where, owner)
    if isinstance(where, Sequence) and not isinstance(where, str):
        for each in where:
            select(tree, each, owner)
    if where is None and isinstance(tree, Part) and tree.named is not None:
        found = [(path, Fit.NAMED if path in tree.named else Fit.WEIGHT, x) for path, x in leaves]
    else:
        found = [(path, fit_of(where, path, leaf), leaf) for path, leaf in leaves]
    chosen = {path: fit for path, fit, _ in found if fit}
    if not chosen and not may_miss(tree):
        raise NoLeaf(f"{owner}={where!r} {no_match(_globs(where), leaves)}")
    for path, fit, leaf in found:
        if fit and not is_float(leaf):
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            shape = tuple(getattr(leaf, "shape", ()))
            raise TypeError(
                f"{owner}={where!r} matches {path!r} of shape {shape} and dtype {dtype}: only "
                "floating leaves can be compressed; exclude it, or choose by a narrower pattern"
            )
    return chosen


def fit_of(where: Where, path: str, leaf: Leaf) -> Fit:
    """How one leaf fits a choice."""
    if where is None or isinstance(where, str):
        where = Glob("**" if where is None else where)
    if isinstance(where, Glob):
        return _fit_of_glob(where, path, leaf)
    if callable(where):
        return Fit.NAMED if where(path, leaf) else Fit.NO
    return max((fit_of(each, path, leaf) for each in where), default=Fit.NO)


def _fit_of_glob(where: Glob, path: str, leaf: Leaf) -> Fit:
    if not glob_matches(where.pattern, path):
        return Fit.NO
    ndim = len(getattr(leaf, "shape", ()))
    if where.min_ndim is not None:
        return Fit.NAMED if ndim >= where.min_ndim and (where.names or is_float(leaf)) else Fit.NO
    if where.names:
        return Fit.NAMED
    return Fit.WEIGHT if ndim >= 2 and is_float(leaf) else Fit.NO


def is_float(leaf: Leaf) -> bool:
    """Whether a leaf is a floating array or stands for one; floats of one byte are codes."""
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and jnp.dtype(leaf.dtype).itemsize > 1


def warn_of_vectors(tree: PyTree, where: Where) -> None:
    """Warns of a glob that names matrices, and vectors of the same name, such as a norm's."""
    if not isinstance(where, str):
        each = where if isinstance(where, Sequence) else ()
        for one in each:
            warn_of_vectors(tree, one)
        return
    ranks = {k: len(getattr(x, "shape", ())) for k, x in named_leaves(tree) if fit_of(where, k, x)}
    vectors = [path for path, rank in ranks.items() if rank < 2]
    if vectors and len(vectors) < len(ranks):
        warnings.warn(
            f"where={where!r} names {', '.join(vectors[:4])}{', ...' * (len(vectors) > 4)} of rank "
            "below 2 too, and takes them; min_ndim=2 leaves them out, as in "
            f"jaxopt_compress.Glob({where!r}, min_ndim=2)",
            stacklevel=4,
        )


def _check_where(where: Any, owner: str) -> None:
    """Refuses values that do not choose leaves.

    Raises:
        TypeError: Says what it is, and how to write what was meant.
    """
    if where is None or isinstance(where, (str, Glob)):
        return
    if callable(where):
        try:
            inspect.signature(where).bind("", None)
        except TypeError:
            raise TypeError(
                f"{owner}= got a predicate that does not take (path, leaf): write "
                "lambda path, leaf: leaf.ndim > 1"
            ) from None
        except ValueError:
            pass  # Some built-in functions do not tell what they take.
    elif isinstance(where, Sequence) and not isinstance(where, bytes):
        for each in where:
            _check_where(each, owner)
    else:
        raise TypeError(no_where(where, owner))


def _globs(where: Where) -> list[str] | None:
    """The globs of a choice; None for the default."""
    if where is None:
        return None
    if isinstance(where, (str, Glob)):
        return [where if isinstance(where, str) else where.pattern]
    return [] if callable(where) else [g for each in where for g in _globs(each) or ["**"]]
