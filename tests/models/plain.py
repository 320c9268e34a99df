"""Plain functions: one weight, one way of using it; convolutions have a file of their own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .case import Case, Expected, dot, lookup, normal, weight


class _Pair(NamedTuple):
    first: jax.Array
    second: jax.Array | None


def weights(shapes):
    """A tree of weights from a tree of shapes; `None` stays a hole."""

    def is_shape(node):
        return isinstance(node, tuple) and all(isinstance(n, int) for n in node)

    leaves, treedef = jax.tree.flatten(shapes, is_leaf=is_shape)
    return jax.tree.unflatten(treedef, [weight(i, *shape) for i, shape in enumerate(leaves)])


def plain(name, fn, shapes, x, uses, expanded=(), reverse=True, extra=()):
    """A case of `fn(params, x, *extra)` with an activation of shape `x` and integer arrays."""

    def make():
        return fn, weights(shapes), (normal(0, *x), *(jnp.asarray(value) for value in extra))

    return Case(name, make, uses, expanded, reverse)


def _einsum(name, equation, x, w, use):
    return plain(f"einsum_{name}", lambda p, x: jnp.einsum(equation, x, p["w"]), {"w": w}, x, use)


def _split(params, x):
    query, key, value = jnp.split(params["qkv"], 3, axis=-1)
    scores = jnp.einsum("bsd,btd->bst", x @ query, x @ key)
    return jax.nn.softmax(scores) @ (x @ value)


def _concatenate_inputs(params, x):
    first, second = x[:, :16], x[:, 16:]
    joined = jnp.concatenate([params.first, params.second], axis=0)
    return jnp.concatenate([jnp.tanh(first), second], axis=-1) @ joined


_HEADS_OUT = {"w": [dot((-3,), (-2, -1))]}
_HEADS_IN = {"w": [dot((-3, -2), (-1,))]}

CASES = [
    plain(
        "matmul",
        lambda p, x: jnp.tanh(x @ p[0]) @ p[1],
        ((16, 24), (24, 12)),
        (2, 5, 16),
        {"0": [dot()], "1": [dot()]},
    ),
    plain(
        "matvec",
        lambda p, x: p.first @ x,
        _Pair((24, 16), None),
        (16,),
        {"first": [dot((-1,), (-2,))]},
    ),
    plain("lax_dot", lambda p, x: lax.dot(x, p["w"]), {"w": (16, 24)}, (5, 16), {"w": [dot()]}),
    _einsum("heads_out", "bsd,dhk->bshk", (2, 5, 16), (16, 3, 8), _HEADS_OUT),
    _einsum("heads_in", "bshk,hkd->bsd", (2, 5, 3, 16), (3, 16, 24), _HEADS_IN),
    _einsum("output_first", "bk,nk->bn", (5, 16), (24, 16), {"w": [dot((-1,), (-2,))]}),
    _einsum("transposed_result", "bk,kn->nb", (5, 16), (16, 24), {"w": [dot()]}),
    _einsum("heads_between", "bk,hkn->bhn", (5, 16), (3, 16, 8), {"w": [dot((-2,), (-3, -1))]}),
    _einsum(
        "experts", "ebk,ekn->ebn", (3, 5, 16), (3, 16, 24), {"w": [dot((-2,), (-1,), batch=(-3,))]}
    ),
    plain(
        "einsum_two_weights",
        lambda p, x: jnp.einsum("bk,kr,rn->bn", x, p["down"], p["up"]),
        {"down": (16, 8), "up": (8, 24)},
        (5, 16),
        {"down": [dot()], "up": [dot()]},
    ),
    plain(
        "take",
        lambda p, x, ids: jnp.take(p["table"], ids, axis=0) + x,
        {"table": (24, 16)},
        (2, 5, 16),
        {"table": [lookup()]},
        extra=([[3, 23, 0, 7, 7], [1, 2, 22, 12, 5]],),
    ),
    plain(
        "take_columns",
        lambda p, x, ids: jnp.take(p["table"], ids, axis=1) * x,
        {"table": (16, 24)},
        (16, 5),
        {"table": [lookup((-1,), (-2,))]},
        extra=([3, 23, 0, 7, 7],),
    ),
    plain(
        "gather",
        lambda p, x, ids: jnp.tanh(p["table"][ids] + x),
        {"table": (24, 16)},
        (5, 16),
        {"table": [lookup()]},
        extra=([3, 23, 0, 7, 7],),
    ),
    plain(
        "gather_experts",
        lambda p, x, ids: jnp.einsum("bk,bkn->bn", x, p["w"][ids]),
        {"w": (3, 16, 24)},
        (4, 16),
        {"w": [lookup((-3,), (-2, -1)), dot(stack=(-3,), count=4 / 3)]},
        extra=([2, 0, 1, 2],),
    ),
    plain(
        "take_experts_for_all_rows",
        lambda p, x, ids: jnp.einsum("bk,ekn->ebn", x, jnp.take(p["w"], ids, axis=0)),
        {"w": (3, 16, 24)},
        (4, 16),
        {"w": [lookup((-3,), (-2, -1)), dot(stack=(-3,), count=4 / 3)]},
        extra=([2, 0, 1, 1],),
    ),
    plain(
        "vmap_experts",
        jax.vmap(lambda p, x, i: jnp.tanh(x @ p["up"][i]) @ p["down"][i], (None, 0, 0)),
        {"up": (3, 16, 24), "down": (3, 24, 16)},
        (4, 5, 16),
        {name: [lookup((-3,), (-2, -1)), dot(stack=(-3,), count=4 / 3)] for name in ("up", "down")},
        extra=([2, 0, 1, 2],),
    ),
    plain(
        "vmap_lookup",
        lambda p, x, ids: jax.vmap(lambda i: p["table"][i])(ids) + x,
        {"table": (24, 16)},
        (5, 16),
        {"table": [lookup()]},
        extra=([3, 23, 0, 7, 7],),
    ),
    plain(
        "vmap_tables",
        lambda p, x, ids: jax.vmap(lambda t, i: t[i])(p["tables"], ids) + x,
        {"tables": (2, 24, 16)},
        (2, 5, 16),
        {"tables": [lookup()._replace(batch=(-3,))]},
        extra=([[3, 23, 0, 7, 7], [1, 2, 22, 12, 5]],),
    ),
    plain(
        "embedding_before_product",
        lambda p, x, ids: (p["table"][ids] + p["position"] + x) @ p["w"],
        {"table": (24, 16), "position": (1, 5, 16), "w": (16, 8)},
        (2, 5, 16),
        {"table": [lookup()], "position": [], "w": [dot()]},
        extra=([[3, 23, 0, 7, 7], [1, 2, 22, 12, 5]],),
    ),
    plain(
        "position_of_the_shape_of_all",
        lambda p, x: (x + p["position"]) @ p["w"],
        {"position": (5, 16), "w": (16, 8)},
        (5, 16),
        {"position": [], "w": [dot()]},
    ),
    plain(
        "label_in_weight_alone",
        lambda p, x: jnp.einsum("bj,hjk->bk", x, p["w"]),
        {"w": (3, 16, 24)},
        (5, 16),
        {"w": [dot((-3, -2))]},
    ),
    plain(
        "weight_norm",
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["size"]),
        {"w": (16, 24), "size": (24,)},
        (5, 16),
        {"w": [dot()]},
        expanded=(),
    ),
    plain(
        "weight_standardization",
        lambda p, x: x @ ((p["w"] - p["w"].mean(0)) / (p["w"].std(0) + 1e-3)),
        {"w": (16, 24)},
        (5, 16),
        {"w": [dot()]},
        expanded=("reduce_sum",),
    ),
    plain(
        "take_of_rank_3",
        lambda p, x, ids: jnp.take(p["table"], ids, axis=0).swapaxes(-1, -2) + x,
        {"table": (24, 3, 16)},
        (2, 5, 16, 3),
        {"table": [lookup((-3,), (-2, -1))]},
        extra=([[3, 23, 0, 7, 7], [1, 2, 22, 12, 5]],),
    ),
    plain(
        "transpose", lambda p, x: x @ p["w"].T, {"w": (24, 16)}, (5, 16), {"w": [dot((-1,), (-2,))]}
    ),
    plain(
        "reshape_heads_out",
        lambda p, x: x @ p["w"].reshape(16, 24),
        {"w": (16, 3, 8)},
        (5, 16),
        _HEADS_OUT,
    ),
    plain(
        "reshape_heads_in",
        lambda p, x: x @ p["w"].reshape(24, 16),
        {"w": (3, 8, 16)},
        (5, 24),
        _HEADS_IN,
    ),
    plain("split", _split, {"qkv": (16, 24)}, (2, 5, 16), {"qkv": [dot(count=3)]}),
    plain(
        "concatenate_outputs",
        lambda p, x: x @ jnp.concatenate(p, axis=-1),
        [(16, 24), (16, 8)],
        (5, 16),
        {"0": [dot()], "1": [dot()]},
    ),
    plain(
        "concatenate_inputs",
        _concatenate_inputs,
        _Pair((16, 24), (8, 24)),
        (5, 24),
        {"first": [dot()], "second": [dot()]},
    ),
    plain(
        "scaled_by_constant",
        lambda p, x: x @ (0.5 * p["w"]),
        {"w": (16, 24)},
        (5, 16),
        {"w": [dot()]},
    ),
    plain(
        "scaled_by_parameter",
        lambda p, x: x @ (p["w"] * p["scale"]),
        {"w": (16, 24), "scale": ()},
        (5, 16),
        {"w": [dot()]},
    ),
    plain(
        "cast",
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        {"w": (16, 24)},
        (5, 16),
        {"w": [dot()]},
    ),
    plain(
        "ragged_dot",
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        {"w": (3, 16, 24)},
        (10, 16),
        {"w": [Expected("ragged_dot_general", (-2,), (-1,), batch=(-3,))]},
        expanded=("ragged_dot_general",),
        extra=([4, 1, 5],),
    ),
]
