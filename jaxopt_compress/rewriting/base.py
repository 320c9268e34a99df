"""What every rewrite offers."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxopt_compress.rewriting.report import Difference
from jaxopt_compress.typing import PyTree


@runtime_checkable
class Rewrite(Protocol):
    """New parameters, and functions that take them.

    A rewrite changes several parameters together, or the function too. It is found on one
    function; ``function`` accepts every function that uses the changed parameters in the same way.
    Each rewrite has a reference: the function itself for those that keep its results, such as
    folding and equalization, and the masked function for those that remove channels.

    Rewrites are composed by finding the second on the function and parameters of the first.

    Attributes:
        params: The new parameters.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> def fn(p, x):
        ...     return jax.nn.relu((x @ p["w"]) * p["scale"] + p["bias"]) @ p["v"]
        >>> p = {"w": jnp.ones((2, 2)), "scale": jnp.array([1.0, 16.0]), "bias": jnp.ones(2)}
        >>> p["v"] = jnp.ones((2, 3))
        >>> x = jnp.ones((1, 2))
        >>> first = jc.fold_norms(fn, p, x)
        >>> second = jc.equalize(first.function(fn), first.params, x)
        >>> isinstance(first, jc.Rewrite), isinstance(second, jc.Rewrite)
        (True, True)
        >>> second.function(first.function(fn))(second.params, x).tolist() == fn(p, x).tolist()
        True
    """

    @property
    def params(self) -> PyTree:
        """The new parameters."""
        ...

    def function(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``g`` such that ``g(rewrite.params, *args)`` computes ``fn(params, *args)``."""
        ...

    def tree(self, x: PyTree) -> PyTree:
        """A tree beside the original parameters, such as masks, for the new parameters."""
        ...

    def undo(self, x: PyTree) -> PyTree:
        """New parameters, trained further or not, as parameters of the original function."""
        ...

    def check(
        self,
        fn: Callable[..., PyTree],
        *args: PyTree,
        tolerance: float | None = None,
        **kwargs: Any,
    ) -> Difference:
        """Measures the rewritten function against the reference."""
        ...
