"""Finding the groups of a function."""

from collections.abc import Callable
from typing import Any

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.lift import uses
from jaxopt_compress.removal.groups import Groups
from jaxopt_compress.rewriting.coupling.analysis import Frame, Names, analyze, chosen
from jaxopt_compress.tree import named_leaves
from jaxopt_compress.typing import PyTree


def find_groups(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    protect: Names = None,
    follow: Names = None,
    **kwargs: Any,
) -> Groups:
    """Finds the channels, heads and other units that can be removed from parameters.

    The function is staged once. Each index of each axis of each value is followed through it:
    transposes, slices, splits, concatenations and lookups by constants move indices; elementwise
    operations and products tie them; a reshape makes pairs of them. Indices that are tied are
    removed together: they are one unit. So fused projections, gates, skip connections, groups of
    heads and scanned layers need no code of their own. A unit of a scanned stack goes from every
    layer; whole layers are units too. So are residual blocks that are written out, ``f`` of sums
    ``x + f(x)``, in the group ``blocks``.

    Indices of inputs and outputs stay, and so do those that meet an operation without a rule.

    Args:
        fn: Any JAX function; it is not changed.
        params: Its parameters: floating arrays and others, or `jax.ShapeDtypeStruct`.
        *args: Its other arguments, likewise; what has no shape is static.
        protect: Parameters that stay whole: a glob over paths, several, or a predicate.
        follow: Inputs and outputs that shrink with the parameters, such as caches and averages of
            batch norms: globs over names, such as ``in/0/**`` and ``out/1/**``, or a predicate. An
            input is named by the number or keyword of its argument after ``params``.
        **kwargs: Further arguments of ``fn``.

    Returns:
        The groups, by name: ``table()``, ``why(path, axis)``, ``scores(...)``, ``plan(...)``.

    Raises:
        TypeError: A parameter is a compressed array, or no array.
        ValueError: ``protect`` or ``follow`` choose nothing.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> def fn(p, x):
        ...     return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]
        >>> p = {"w": jnp.arange(1.0, 9).reshape(2, 4), "b": jnp.zeros(4), "v": jnp.ones((4, 3))}
        >>> x = jnp.ones((1, 2))
        >>> groups = jc.find_groups(fn, p, x)
        >>> print(groups.table())
        w:1  4 units  exact
            w axis 1
            b axis 0
            v axis 0
        >>> plan = groups.plan({"w:1": [0, 2]})
        >>> rewrite = plan.rewrite()
        >>> rewrite.params["w"].shape, rewrite.params["b"].shape, rewrite.params["v"].shape
        ((2, 2), (2,), (2, 3))
        >>> masked = jc.materialize(jc.compress(p, plan.compression))
        >>> bool((rewrite.function(fn)(rewrite.params, x) == fn(masked, x)).all())
        True

    References:
        Fang et al., 2023, DepGraph: Towards Any Structural Pruning.
    """
    for path, x in named_leaves(params):
        if is_compressed(x) or not hasattr(x, "shape"):
            raise TypeError(
                f"{path!r} is a {type(x).__name__}; groups are found on arrays: materialize it "
                "before, or close the function over what is no array"
            )
    frame = Frame(protect, follow)
    found = analyze(fn, params, args, kwargs, frame)
    _check_chosen("protect", protect, list(found.params))
    _check_chosen("follow", follow, [*found.inputs, *found.outputs])
    return Groups(fn, params, found, frame, lambda: uses(fn, params, *args, **kwargs))


def _check_chosen(owner: str, names: Names, there: list[str]) -> None:
    """Refuses globs that choose nothing."""
    globs = [names] if names is None or isinstance(names, str) or callable(names) else names
    for each in globs:
        if each is not None and not any(chosen(each, name) for name in there):
            raise ValueError(f"{owner}={each!r} chooses nothing; there are {', '.join(there)}")
