"""Answers to keywords that other tools use."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from jaxopt_compress.typing import PyTree

Fn = TypeVar("Fn", bound=Callable[..., Any])


def answers(known: dict[str, str]) -> Callable[[Fn], Fn]:
    """Makes a function answer unknown keywords with its own.

    Args:
        known: A keyword of other tools -> how to say the same here.
    """

    def decorate(fn: Fn) -> Fn:
        names = list(inspect.signature(fn).parameters)

        @functools.wraps(fn)
        def checked(*args: PyTree, **kwargs: Any) -> Any:
            for key in kwargs.keys() - set(names):
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
                other = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(names)}"
                hint = known.get(key, other)
                raise TypeError(f"{fn.__name__}() has no argument {key}=: {hint}")
            return fn(*args, **kwargs)

        return checked  # pyright: ignore[reportReturnType]

    return decorate
