"""The laws of every compression as functions, and the leaves that they are tried on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxopt_compress as jc
from tests.method_contract import Method

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
# Few shapes, so that what is compiled for one example serves the next.
SHAPES = {"even": (8, 6), "stack": (3, 8, 4), "ragged": (5, 1), "scalar": (), "empty": (0, 4)}
KINDS = ("normal", "wide", "subnormal", "huge", "positive", "ties")

# Kinds that go through LAPACK or random numbers, or add parts, and keep no zeros.
FACTORS = {"low_rank", "low_rank_plus_sparse", "lora", "share_sums", "tensor_train"}


def values(seed: int, kind: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Entries of one kind, a third of them zeros of either sign."""
    rng, info = np.random.default_rng(seed), ml_dtypes.finfo(dtype)
    x = rng.standard_normal(shape)
    if kind == "wide":
        x = x * np.exp(rng.uniform(-9, 9, shape))
    elif kind == "subnormal":
        x = rng.integers(-9, 10, shape) * float(info.smallest_subnormal)
    elif kind == "huge":
        x = np.clip(x, -1, 1) * float(info.max)
    elif kind == "positive":
        x = np.abs(x) + 0.5
    elif kind == "ties":
        x = rng.integers(-2, 3, shape) * 0.5
    zero = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    return jnp.asarray(np.where(rng.random(shape) < 0.3, zero, x).astype(dtype))


def tree(method: Method, seed: int, kind: str, names: Sequence[str] | None = None) -> Any:
    """A leaf of each shape that the method takes, the dtypes in turn."""
    names = method.leaves if names is None else names
    shapes = [(i, name) for i, name in enumerate(SHAPES) if name in names]
    return {
        name: values(seed + i, kind, SHAPES[name], DTYPES[i % 3])
        for i, name in shapes
        if method.takes(SHAPES[name])
    }


def made(method: Method, params: dict[str, jax.Array]) -> jc.Compression:
    """The method for all leaves of a tree."""
    return method.build(list(params))


def assert_same_bits(got: Any, want: Any, what: str = "") -> None:
    """Equal structures, shapes, dtypes and bytes: -0.0 and 0.0 differ."""
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        where = f"{what} {jax.tree_util.keystr(path)}"
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert a.tobytes() == b.tobytes(), f"{where}\n{a}\n{b}"


def consume(view: Any, x: jax.Array) -> tuple[Any, ...]:
    """Float32 uses of a view that a compiler would like to fuse with how it is made."""
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), view)

    def dot(w):
        rows = w.reshape(w.shape[0], int(np.prod(w.shape[1:]))) if w.ndim else w.reshape(1, 1)
        return jnp.full((2, rows.shape[0]), x) @ rows

    return (
        jax.tree.map(lambda w: w + 1, wide),
        jax.tree.map(lambda w: w * x, wide),
        jax.tree.map(dot, wide),
    )


class Programs(NamedTuple):
    """The compiled forms of one compression, reused for many examples."""

    compression: jc.Compression
    init: Callable[..., Any]
    apply: Callable[..., Any]
    consume: Callable[..., Any]
    consume_view: Callable[..., Any]
    consume_small: Callable[..., Any]
    materialize: Callable[..., Any]


def programs(method: Method, params: dict[str, jax.Array]) -> Programs:
    """Compiles on first use."""
    c = made(method, params)
    return Programs(
        c,
        c.init if method.needs_values else jax.jit(c.init),
        jax.jit(c.apply),
        jax.jit(consume),
        jax.jit(lambda params, state, x: consume(c.apply(params, state), x)),
        jax.jit(lambda small, x: consume(jc.materialize(small), x)),
        jax.jit(jc.materialize),
    )


def check_contract(run: Programs, params: Any, state: Any) -> None:
    """`materialize(compress(p, s)) == apply(p, s)`, whatever each is compiled into."""
    view = run.compression.apply(params, state)
    small = run.compression.compress(params, state)
    assert jax.tree.map(lambda w: (w.shape, w.dtype), view) == jax.tree.map(
        lambda w: (w.shape, w.dtype), params
    )
    assert_same_bits(run.apply(params, state), view, "apply under jit")
    assert_same_bits(jc.materialize(small), view, "materialize")
    assert_same_bits(run.materialize(small), view, "materialize under jit")
    x = jnp.float32(1.7)
    want = run.consume(view, x)
    assert_same_bits(run.consume_view(params, state, x), want, "a consumer of apply")
    assert_same_bits(run.consume_small(small, x), want, "a consumer of materialize")


def check_init(run: Programs, params: Any) -> Any:
    """`init` decides the same under jit; returns the state."""
    state = run.compression.init(params)
    # Low rank goes through LAPACK, and its products are fused differently.
    exact = not kinds(state) & FACTORS
    if exact:
        assert_same_bits(run.init(params), state, "init under jit")
    return state


def kinds(state: Any) -> set[str]:
    """The kinds of a state's leaves."""
    inner = getattr(state, "states", None)
    if inner is not None:
        return set().union(*map(kinds, inner))
    return {leaf.kind for leaf in state.leaves.values()}


def check_zeros(run: Programs, params: Any, state: Any) -> None:
    """Where a parameter is zero, its view is."""
    view = run.apply(params, state)
    for path, w in params.items():
        assert not np.any(np.asarray(view[path])[np.asarray(w) == 0]), path


def signature(tree: Any) -> Any:
    """Structure, shapes, dtypes and weak types."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree)


def check_steps(c: jc.Compression, params: Any) -> None:
    """States are arrays that keep their types; a second step is not traced again.

    A state may be given away; what an update does not read need not be reused.
    """
    traced = []

    @jax.jit
    def step(state, params):
        traced.append(1)
        # Any gradients; methods that need none do not read them.
        state = c.update(state, params, grads=params)
        return state, c.apply(params, state)

    first = state = c.init(params)
    updated = []
    for _ in range(3):
        new, view = step(state, params)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert signature(new) == signature(state)
        assert signature(view) == signature(params)
        updated.append(new)
        state = new
    assert len(traced) == 1
    donated = jax.tree.map(jnp.copy, first)
    update = jax.jit(functools.partial(c.update, grads=params), donate_argnums=0)
    assert_same_bits(update(donated, params), updated[0], "donation")
    assert any(x.is_deleted() for x in jax.tree.leaves(donated))


def check_vmap(c: jc.Compression, trees: list[Any]) -> None:
    """A stack of parameters and states has the stack of views."""
    states = [c.init(params) for params in trees]
    stack = lambda xs: jax.tree.map(lambda *x: np.stack(x), *xs)
    apply = jax.jit(c.apply)
    want = stack([apply(p, s) for p, s in zip(trees, states, strict=True)])
    got = jax.jit(jax.vmap(c.apply))(stack(trees), stack(states))
    assert_same_bits(got, want, "apply under vmap")


def check_gradient(c: jc.Compression, params: Any, state: Any, scaled: bool = False) -> None:
    """Slopes at the parameters are 0 or exactly those at the view; jvp and vjp agree."""
    weights = jax.tree.map(lambda w: jnp.full(w.shape, 1.5, w.dtype), params)
    _, pull = jax.vjp(functools.partial(c.apply, state=state), params)
    _, pushed = jax.jvp(functools.partial(c.apply, state=state), (params,), (weights,))
    back = pull(weights)[0]
    assert_same_bits(back, pushed, "jvp")
    for path, slope in back.items():
        known = np.isin(np.asarray(slope, np.float32), [0.0, 1.5])
        assert scaled or known.all(), path
