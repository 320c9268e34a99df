"""Each primitive with a rule: which units there are, and that masked equals removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from tests.removal import law

pytestmark = pytest.mark.ci

# The axis that shrinks is 7 long, and nothing else is; after every third unit went, it is 5.
HIDDEN = 7


def mlp(middle, out=HIDDEN):
    """A hidden layer with something in the middle, on which two products meet."""
    params = {"b": (HIDDEN,), "v": (out, 2), "w": (3, HIDDEN)}
    fn = lambda p, x: middle(x @ p["w"] + p["b"]) @ p["v"]
    return fn, params, (4, 3)


def scan_layers(p, x):
    def layer(x, at):
        return x + jax.nn.relu(x @ at["w"]) @ at["v"], x.sum()

    return lax.scan(layer, x, {"w": p["w"], "v": p["v"]}, reverse=True)


def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(h @ p["u"] + x @ p["w"]), None

    return lax.scan(step, jnp.zeros((4, HIDDEN)), x)[0] @ p["v"]


def doubled(p, x):
    body = lambda state: (state[0] + 1, jnp.tanh(state[1] @ p["u"]))
    return lax.while_loop(lambda s: s[0] < 3, body, (0, x @ p["w"]))[1] @ p["v"]


@jax.custom_vjp
def clipped(x, y):
    return x * y


clipped.defvjp(
    lambda x, y: (x * y, (x, y)),
    lambda r, g: (jnp.clip(g * r[1], -0.1, 0.1), (g * r[0]).sum(0)),
)


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvps(lambda t, out, x: 2 * t * x)


def branches(h):
    return lax.switch(jnp.int32(h[0, 0] > 0), [jnp.sin, lambda h: jax.nn.relu(h) * 2], h)


def picture(p, x, groups=1, pool=lambda h: h):
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w, n=1: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=n
    )
    h = pool(jax.nn.relu(conv(x, p["w"]) + p["b"]))
    h = conv(h, p["u"], groups) if "u" in p else h
    return h.reshape(h.shape[0], -1) @ p["v"]


def heads(p, x):
    q, k, v = ((x @ p[name]).reshape(4, 7, 3) for name in "qkv")
    a = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", q, k) / 3**0.5)
    return jnp.einsum("hij,jhd->ihd", a, v).reshape(4, 21) @ p["o"]


def grouped_queries(p, x):
    q = (x @ p["q"]).reshape(4, 14, 3)
    k = jnp.repeat((x @ p["k"]).reshape(4, 7, 3), 2, axis=1)
    return jnp.einsum("ihd,jhd->hij", q, k)


def carried(p, x):
    cache = lax.dynamic_update_slice(jnp.zeros((6, HIDDEN)), x @ p["w"], (1, 0))
    return cache.at[0].set(p["b"]).at[2].add(p["b"]) @ p["v"]


POOL = (1, 2, 2, 1)
SQUARE = {"u": (HIDDEN, HIDDEN), "v": (HIDDEN, 2), "w": (3, HIDDEN)}
PICTURE = {"b": (HIDDEN,), "v": (16 * HIDDEN, 2), "w": (3, 3, 2, HIDDEN)}
ORDER = np.array([1, 0, 5, 4, 3, 2, 6])
ONE = {"w:1": 7}
CASES = {
    "relu": (*mlp(jax.nn.relu), ONE),
    "gelu": (*mlp(jax.nn.gelu), ONE),
    "sigmoid": (*mlp(jax.nn.sigmoid), ONE),
    "transpose": (*mlp(lambda h: (h.T * 2).T), ONE),
    "rev": (*mlp(lambda h: h + h[:, ::-1]), {"w:1": 3}),
    "square": (*mlp(lambda h: jnp.square(h) + lax.integer_pow(h, 3)), ONE),
    "clamp": (*mlp(lambda h: jnp.clip(h, -1, 1)), ONE),
    "where": (*mlp(lambda h: jnp.where(h > 1, h, -h)), ONE),
    "iota": (*mlp(lambda h: h * jnp.arange(HIDDEN)), ONE),
    "constant": (*mlp(lambda h: h * np.arange(1.0, 8, dtype=np.float32)), ONE),
    "dropout": (*mlp(lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape)), ONE),
    "barrier": (*mlp(lambda h: lax.optimization_barrier((h, h))[0]), ONE),
    "cumsum": (*mlp(lambda h: jnp.cumsum(h, 0)), ONE),
    "sort": (*mlp(lambda h: jnp.sort(h, axis=0)), ONE),
    "max": (*mlp(lambda h: h - h.max(0)), ONE),
    "mean": (*mlp(lambda h: h - h.mean(1, keepdims=True)), ONE),
    "broadcast": (*mlp(lambda h: jnp.broadcast_to(h[0], (5, HIDDEN))), ONE),
    "squeeze": (*mlp(lambda h: jnp.squeeze(jnp.expand_dims(h, (0, 2)), (0, 2))), ONE),
    "permutation": (*mlp(lambda h: h + h[:, ORDER]), {"w:1": 3}),
    "take": (*mlp(lambda h: jnp.take(h, jnp.asarray(ORDER), axis=1)), ONE),
    "pad": (*mlp(lambda h: jnp.pad(h, ((0, 0), (1, 2))), 10), ONE | {"v:0": 3}),
    "roll": (*mlp(lambda h: jnp.roll(h, 2, axis=1)), ONE),
    "concatenate": (*mlp(lambda h: jnp.concatenate([h, jnp.sin(h)], 1), 14), ONE),
    "split": (*mlp(lambda h: jnp.concatenate(jnp.split(h, [2, 4], 1), 1)), ONE),
    "slice": (*mlp(lambda h: h[:, 1:] * h[:, ::-1][:, 1:], 6), {"w:1": 2}),
    "stack": (*mlp(lambda h: jnp.stack([h, jnp.sin(h)], 1).sum(1)), ONE),
    "unstack": (*mlp(lambda h: h * jnp.stack(jnp.unstack(h + 1, axis=0))), ONE),
    "tile": (*mlp(lambda h: jnp.tile(h, (1, 2)), 14), ONE | {"v:0": 2}),
    "tile_one": (*mlp(lambda h: jnp.tile(h[:1], (4, 1))), ONE),
    "repeat": (*mlp(lambda h: jnp.repeat(h, 2, axis=1), 14), ONE | {"v:0": 2}),
    "vmap": (*mlp(jax.vmap(lambda h: h / (1 + jnp.abs(h)))), ONE),
    "jit": (*mlp(jax.jit(lambda h: jnp.tanh(h) * h)), ONE),
    "remat": (*mlp(jax.checkpoint(lambda h: jnp.sin(h) * h)), ONE),
    "cond": (*mlp(branches), {"w:1": 6}),
    "custom_jvp": (*mlp(cubed), ONE),
    "custom_vjp": (*mlp(lambda h: clipped(h, jnp.arange(1.0, 8))), ONE),
    "scatter": (carried, {"b": (7,), "v": (7, 2), "w": (3, 7)}, (4, 3), ONE),
    "scan_layers": (scan_layers, {"v": (2, 7, 3), "w": (2, 3, 7)}, (4, 3), {"w:2": 7}),
    "scan_carry": (recurrent, SQUARE, (5, 4, 3), {"u:0": 7}),
    "while": (doubled, SQUARE, (4, 3), ONE),
    "conv": (picture, PICTURE, (2, 4, 4, 2), {"w:3": 7}),
    "grouped_conv": (
        lambda p, x: picture(p, x, 7),
        PICTURE | {"b": (21,), "u": (3, 3, 3, 14), "v": (224, 2), "w": (3, 3, 2, 21)},
        (2, 4, 4, 2),
        {"u:2": 3, "u:3": 7, "u:3.2": 2},
    ),
    "depthwise": (
        lambda p, x: picture(p, x, 7),
        PICTURE | {"u": (3, 3, 1, 7)},
        (2, 4, 4, 2),
        {"w:3": 7},
    ),
    "max_pool": (
        lambda p, x: picture(
            p, x, 1, lambda h: lax.reduce_window(h, -jnp.inf, lax.max, POOL, POOL, "SAME")
        ),
        PICTURE | {"v": (28, 2)},
        (2, 4, 4, 2),
        {"w:3": 7},
    ),
    "heads": (
        heads,
        {"q": (5, 21), "k": (5, 21), "v": (5, 21), "o": (21, 2)},
        (4, 5),
        {"q:1": 3, "q:1.2": 7, "v:1": 3},
    ),
    "grouped_queries": (
        grouped_queries,
        {"q": (5, 42), "k": (5, 21)},
        (4, 5),
        {"k:1": 3},
    ),
    "ragged_dot": (
        lambda p, x: lax.ragged_dot(
            jax.nn.relu(lax.ragged_dot(x, p["w"], jnp.int32([3, 2]))), p["v"], jnp.int32([3, 2])
        ),
        {"w": (2, 3, 7), "v": (2, 7, 2)},
        (5, 3),
        {"w:2": 7},
    ),
    "embedding": (
        lambda p, x: jax.nn.relu(p["e"][jnp.int32(x[:, 0])]) @ p["e"].T,
        {"e": (5, 7)},
        (4, 1),
        {"e:1": 7},
    ),
}  # fmt: skip
FAST = ("rev", "where", "iota", "take", "pad", "split", "custom_jvp", "custom_vjp", "scatter")
FAST += ("scan_layers", "grouped_conv", "heads", "grouped_queries")


@pytest.mark.fast(*FAST)
@pytest.mark.parametrize("name", CASES)
def test_masked_equals_removed(name):
    fn, shapes, shape, expected = CASES[name]
    params = law.values({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    groups = jc.find_groups(fn, params, x)
    assert {k: len(g) for k, g in groups.items()} == expected
    plan = law.every_third(groups)
    assert plan.units and not plan.inexact
    law.check(fn, params, (x,), plan, grad=name != "while")
    # Random numbers are drawn for all indices; what made the lookup's indices is left, unused.
    if expected == ONE and name not in ("dropout", "take", "while"):
        g = plan.rewrite().function(fn)
        for f in (g, jax.grad(law.loss(g))):
            assert HIDDEN not in law.lengths(jax.make_jaxpr(f)(plan.rewrite().params, x).jaxpr)
