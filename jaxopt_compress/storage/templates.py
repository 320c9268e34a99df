"""Matching what a checkpoint holds with the template that it is restored into."""

import difflib
import warnings
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.arrays.fields import is_key
from jaxopt_compress.storage.schema import Outside
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import Leaf, PyTree


class ReplicatedWarning(UserWarning):
    """A compressed array is whole on each device, although its template is split."""


def match(stored: PyTree, like: PyTree) -> tuple[dict[str, Leaf], dict[str, PyTree]]:
    """The leaves of a checkpoint and the shardings that a template asks for, by path.

    Args:
        stored: A tree with entries in the place of arrays.
        like: A tree with leaves of the same paths.

    Returns:
        ``(leaves, shardings)``: path -> leaf, and path -> a sharding or None per entry of it.
        Functions are those of the template, and leaves that it has as ``...`` stay so.

    Raises:
        ValueError: Paths, shapes or dtypes differ.
    """
    leaves, templates = _by_name(stored, "the checkpoint"), _by_name(like, "like")
    _check_names(leaves, templates)
    for name, x in leaves.items():
        if isinstance(x, Outside):
            if not callable(templates[name]):
                raise ValueError(f"{name!r} is the function {x.name} in the checkpoint")
            leaves[name] = templates[name]
        if templates[name] is ...:
            leaves[name] = ...
    return leaves, {name: _shardings(name, x, templates[name]) for name, x in leaves.items()}


def is_split(sharding: object) -> bool:
    """Whether an array of this sharding is on several devices."""
    return isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1


def _by_name(tree: PyTree, what: str) -> dict[str, Leaf]:
    leaves = named_leaves(tree)
    named = dict(leaves)
    if len(named) < len(leaves):
        raise ValueError(
            f"{what} has several leaves of the same path and cannot be matched by path"
        )
    return named


def _check_names(stored: Mapping[str, Leaf], templates: Mapping[str, Leaf]) -> None:
    for names, others, problem in (
        (templates, stored, "the checkpoint has no"),
        (stored, templates, "like has no"),
    ):
        missing = [name for name in names if name not in others]
        if missing:
            near = difflib.get_close_matches(missing[0], others, n=3, cutoff=0.0)
            raise ValueError(f"{problem} {missing[0]!r}; it has {', '.join(near) or 'no leaves'}")


def _shardings(name: str, stored: Leaf, template: Leaf) -> PyTree:
    """A sharding or None per entry of one stored leaf, from its template."""
    if getattr(stored, "kind", None) == "key" and is_key(template):
        # The file holds the key's data, of one more axis, on one device.
        template = jax.eval_shape(jax.random.key_data, template)
    if hasattr(stored, "shape") and hasattr(template, "shape"):
        ours, theirs = (f"{x.dtype}{list(x.shape)}" for x in (stored, template))
        if ours != theirs:
            raise ValueError(f"{name!r} is {ours} in the checkpoint and {theirs} in like")
    none = jax.tree.map(lambda _: None, stored)
    if not is_compressed(stored):
        return getattr(template, "sharding", None)
    if is_compressed(template):
        same = jax.tree.structure(stored) == jax.tree.structure(template)
        sharding_of = lambda _, x: getattr(x, "sharding", None)
        return jax.tree.map(sharding_of, stored, template) if same else none
    sharding = getattr(template, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not is_split(sharding):
        return none
    named = lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    try:
        found = jax.tree.map(named, stored.specs(sharding.spec), is_leaf=is_spec)
        jax.tree.map(lambda x, s: s.shard_shape(tuple(x.shape)), stored, found)
        return found
    except ValueError as error:
        warnings.warn(
            f"{name!r} lies whole on each device, since its form cannot be split as in like: "
            f"{error}",
            ReplicatedWarning,
            stacklevel=4,
        )
        return jax.tree.map(lambda _: named(PartitionSpec()), stored)
