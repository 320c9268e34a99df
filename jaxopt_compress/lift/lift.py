"""Running a function on compressed arguments."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.lift import _compat
from jaxopt_compress.lift.interpreter import OnFallback, Ref, Replay, replay_jaxpr
from jaxopt_compress.lift.views.joined import Joined
from jaxopt_compress.tree import kind_of, path_of
from jaxopt_compress.typing import PyTree, Value

Fn = TypeVar("Fn", bound=Callable[..., PyTree])

POLICIES = ("warn", "error", "densify")


def lift(fn: Fn, on_fallback: OnFallback = "warn", pallas: bool = False) -> Fn:
    """Lets a function take compressed arrays wherever it takes arrays.

    With dense arguments the lifted function is ``fn`` itself. Otherwise ``fn`` is staged as if the
    compressed arguments were dense, and its operations are replayed: those that a compressed value
    reaches run on its stored form, all others as they are. Scans over stacked layers, remat,
    custom derivatives, shardings and `jax.shard_map` are kept. It composes with `jax.jit`,
    `jax.grad`, `jax.vmap` and the rest; use it under `jax.jit`, since each call stages ``fn`` anew.
    For the backward pass of a scan over layers codes are kept in memory, not decoded weights.

    Results equal those of the dense weights up to the order of rounding: the sum of a product is
    taken over codes and scaled once, and a weight that ``fn`` casts is not rounded in between. A
    result that is a view of a compressed argument, such as its transpose, stays compressed.

    Args:
        fn: Any JAX function; compressed arrays may be anywhere in its arguments. It must return
            arrays.
        on_fallback: What to do where an operation has no rule for a compressed value, so that the
            value has to be materialized: ``"warn"``, raise an ``"error"``, or ``"densify"``
            silently.
        pallas: Whether products on TPUs and NVIDIA GPUs may run in kernels of this package, where
            XLA would write a dense weight: with activations of 16 bits, most formats with steps of
            groups or packed in words, and codebooks; on GPUs also where it would copy layers of a
            scanned stack. Compilers for TPUs do not split such kernels: pass it on one device
            there, or inside of `jax.shard_map`.

    Returns:
        A function with the signature of ``fn``.

    Raises:
        FallbackError: In a call, with ``on_fallback="error"``; names the primitive, the argument
            and the line of ``fn``.
        TypeError: ``fn`` is not a function, or ``on_fallback`` not a string (but the parameters).
        ValueError: ``on_fallback`` is none of the three.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
        >>> small = jc.compress(params, jc.quantize("int8"))
        >>> model = lambda params, x: jnp.tanh(x @ params["w"])
        >>> jax.jit(jc.lift(model))(small, jnp.ones((2, 4))).shape
        (2, 3)
    """
    if not callable(fn) or not isinstance(on_fallback, str):
        raise TypeError(
            "lift(fn) takes a function and returns one, which is called on the compressed "
            f"parameters: lift(fn)(small, ...); this is lift({kind_of(fn)}, {kind_of(on_fallback)})"
        )
    if on_fallback not in POLICIES:
        raise ValueError(f"on_fallback={on_fallback!r}; it is one of {', '.join(POLICIES)}")

    @functools.wraps(fn)
    def lifted(*args: PyTree, **kwargs: Any) -> Value:
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_compressed)
        if not any(map(is_compressed, leaves)):
            return fn(*args, **kwargs)
        return replay_call(fn, Replay(on_fallback, pallas), args, kwargs)

    # The mark for callers that would lift a function themselves; jax.jit passes it on.
    lifted.is_lifted = True  # pyright: ignore[reportAttributeAccessIssue]
    return lifted  # pyright: ignore[reportReturnType]


def replay_call(fn: Callable[..., PyTree], replay: Replay, args: tuple, kwargs: dict) -> Value:
    """Stages ``fn`` with dense types for compressed arguments, and replays it."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_compressed)
    leaves = [leaf for _, leaf in keyed]
    # Static arguments stay static: Python scalars and NumPy arrays reach ``fn`` as they are.
    staged = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) or is_compressed(x)]

    def flat(*values: Value) -> Value:
        full = list(leaves)
        for i, value in zip(staged, values, strict=True):
            full[i] = value
        inner_args, inner_kwargs = jax.tree.unflatten(treedef, full)
        return fn(*inner_args, **inner_kwargs)

    flat.__name__ = getattr(fn, "__name__", type(fn).__name__)  # Errors of staging name it.
    given = [leaves[i] for i in staged]
    types = [_compat.dense_type(x) if is_compressed(x) else x for x in given]
    closed, out_tree = jax.make_jaxpr(flat, return_shape=True)(*types)
    operands = [
        Ref(leaves[i], _argument_path(keyed[i][0])) if is_compressed(leaves[i]) else leaves[i]
        for i in staged
    ]
    results = replay_jaxpr(replay, closed, operands)
    results = [x.array if isinstance(x, Ref) else x for x in results]
    # What only exists inside of a replay becomes an array.
    results = [x.materialize() if isinstance(x, Joined) else x for x in results]
    return jax.tree.unflatten(jax.tree.structure(out_tree), results)


def _argument_path(keys: tuple[Any, ...]) -> str:
    """The path of a leaf within the argument that holds it."""
    _, position, *inner = keys
    return path_of(tuple(inner)) or f"argument {path_of((position,))}"
