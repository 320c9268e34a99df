"""What a model of the zoo is, and the words its hand-written answers are made of."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Expected(NamedTuple):
    """One use of a parameter, as worked out by hand.

    Axes are those of the parameter itself, counted from the end, and sorted. Uses of one parameter
    that differ only in `count` are one entry with the counts added.

    Attributes:
        op: primitive that consumes the parameter.
        contracting: axes summed over.
        output: axes that appear in the result and that the activation does not have. Of a grouped
            convolution, the output channels, although groups tie them to the input's.
        stack: axes scanned over, or removed by an index.
        batch: axes that the parameter shares with the activation: experts, models under vmap.
        gathered: axes that an embedding lookup indexes.
        count: executions per call over the product of the stack sizes; `None` where data decides,
            that is in while loops and in branches.
    """

    op: str
    contracting: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()
    count: int | None = 1


class Case(NamedTuple):
    """A function of parameters, with how it uses each of them.

    Attributes:
        name: unique name, which is also the test's id.
        make: builds `(fn, params, args)`; `fn(params, *args)` gives an array or a tree of them.
        uses: by path, the uses of every leaf of rank 2 and more. An empty list is a leaf that meets
            no contraction, such as the biases of stacked layers.
        expanded: primitives at which a dense fallback is expected when every leaf with a use is
            compressed.
        reverse: whether reverse-mode derivatives exist; forward mode is the only one through a
            `while_loop`.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    uses: dict[str, list[Expected]]
    expanded: tuple[str, ...] = ()
    reverse: bool = True


def dot(
    contracting: tuple[int, ...] = (-2,),
    output: tuple[int, ...] = (-1,),
    *,
    stack: tuple[int, ...] = (),
    batch: tuple[int, ...] = (),
    count: int | None = 1,
) -> Expected:
    """A matrix product; by default with a kernel of shape [in, out]."""
    return Expected("dot_general", contracting, output, stack, batch, (), count)


def conv(contracting: tuple[int, ...], output: tuple[int, ...]) -> Expected:
    """A convolution."""
    return Expected("conv_general_dilated", contracting, output)


def lookup(gathered: tuple[int, ...] = (-2,), output: tuple[int, ...] = (-1,)) -> Expected:
    """An embedding lookup; by default in a table of shape [vocabulary, features]."""
    return Expected("gather", (), output, gathered=gathered)


def normal(seed: int, *shape: int) -> jax.Array:
    """A float32 activation of unit variance; the same on every version of JAX."""
    return jax.numpy.asarray(_normal(seed, shape))


def weight(seed: int, *shape: int) -> jax.Array:
    """A float32 weight, small enough for deep or recurrent use to stay finite."""
    return jax.numpy.asarray(_normal(1000 + seed, shape) / 4)


def _normal(seed, shape):
    """By NumPy, which compiles nothing."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def filled(shapes: Any) -> Any:
    """Values for a tree of shapes, which costs less than to run the models' own initializers.

    Scales and variances are positive. What is no `jax.ShapeDtypeStruct` stays as it is.
    """

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = weight(zlib.crc32(name.encode()), *leaf.shape)
        is_positive = name.removesuffix("/value").endswith(("scale", "var"))
        return jax.numpy.asarray(np.exp(value)) if is_positive else value

    return jax.tree_util.tree_map_with_path(fill, shapes)


def leaves_by_path(params: Any) -> dict[str, jax.Array]:
    """Leaves of a tree by '/'-joined path.

    >>> list(leaves_by_path({"layer": [jax.numpy.ones(2)]}))
    ['layer/0']
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
