"""Which functions are equalized: random ones bit for bit, and why others are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.rewriting.equalize_test import spread

pytestmark = pytest.mark.ci


def twice(p, x):
    h = jax.nn.relu(x @ p["w"])
    return jax.nn.relu(h @ p["v"]) @ p["v"]


def residual(p, x):
    return (x + jax.nn.relu(x @ p["w"])) @ p["v"]


def stacked(p, x):
    def body(h, w):
        return jax.nn.relu(h @ w), None

    return jax.lax.scan(body, jax.nn.relu(x @ p["w"]), p["stack"])[0] @ p["v"]


def grouped(p, x):
    h = jax.nn.relu(x @ p["w"])[:, None]
    return jax.lax.conv_general_dilated(
        h, p["groups"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda p, x: jax.nn.gelu(x @ p["w"]) @ p["v"], "not positively homogeneous"),
        (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], "tanh is not positively"),
        (lambda p, x: jax.nn.relu6(x @ p["w"]) @ p["v"], "joins it with another value"),
        (lambda p, x: jax.nn.relu(x @ p["w"] + 1) @ p["v"], "joins it with another value"),
        (lambda p, x: jax.nn.relu(x @ p["w"] + p["b"].sum()) @ p["v"], "joins it with"),
        (lambda p, x: (x @ p["w"] + p["b"][:1]) @ p["v"], "joins it with"),
        (lambda p, x: (x @ p["w"]).T @ p["v"], "does not sum over its channels"),
        (lambda p, x: (lambda h: (h, h @ p["v"]))(x @ p["w"]), "a result of the function"),
        (lambda p, x: (x @ p["w"]).reshape(-1, 2) @ p["v"][:2], "keep its axis of channels"),
        (lambda p, x: (x @ p["w"] + p["w"][:1]) @ p["v"], "joins it with another value"),
        (lambda p, x: (x @ p["w"] + p["w"]) @ p["v"], "'w' is used 2 times"),
        (lambda p, x: (x @ p["w"]) @ jnp.tanh(p["v"]), "without a weight of its own"),
        (lambda p, x: (lambda h: h @ h.T)(x @ p["w"]), "without a weight of its own"),
        (lambda p, x: (x @ p["w"]).sum(-1), "reduce_sum does not keep its axis"),
        (lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["v"], "channels"),
        (lambda p, x: (x @ p["w"]) ** 2 @ p["v"], "not positively homogeneous"),
        (residual, "joins it with another value"),
        (twice, "'v' is used 2 times"),
        (stacked, "scan"),
        (grouped, "groups of channels"),
    ],
)
def test_what_is_refused_says_why(fn, reason):
    w = jnp.ones((4, 4))
    p = {"w": w, "v": w, "b": jnp.ones(4), "stack": jnp.ones((2, 4, 4))}
    p["groups"] = jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match="no two products") as error:
        jc.equalize(fn, p, jnp.ones((4, 4)))
    assert reason in str(error.value).split("'w': ")[1]


def test_weights_in_a_scan_are_listed():
    w = jnp.ones((4, 4))
    p = {"w": w, "v": w, "u": w, "stack": jnp.ones((2, 4, 4))}
    rw = jc.equalize(lambda p, x: jax.nn.relu(stacked(p, x)) @ p["u"], p, jnp.ones((4, 4)))
    assert "inside of scan" in rw.skipped["stack"] and set(rw.factors) == {"v", "u"}


def rowwise(h):
    return h / (1 + jnp.square(h).sum(-1, keepdims=True))


STEPS = {
    "dense": lambda h, w, b, f: h @ w,
    "transposed": lambda h, w, b, f: jnp.einsum("oi,nti->nto", w, h),
    "left": lambda h, w, b, f: jnp.einsum("io,nti->nto", w, h),
    "bias": lambda h, w, b, f: h + b,
    "columns": lambda h, w, b, f: h - w[:, :1].T,
    "scale": lambda h, w, b, f: h * b,
    "relu": lambda h, w, b, f: jax.nn.relu(h),
    "leaky": lambda h, w, b, f: jax.nn.leaky_relu(h, 0.25),
    "abs": lambda h, w, b, f: jnp.maximum(h, -h),
    "pool": lambda h, w, b, f: jnp.broadcast_to(h.max(1, keepdims=True), h.shape),
    "swap": lambda h, w, b, f: h.transpose(2, 0, 1).reshape(4, -1, 3).transpose(1, 2, 0),
    "flat": lambda h, w, b, f: jax.nn.relu(h.reshape(2, -1) - jnp.abs(h).max()).reshape(h.shape),
    "wide": lambda h, w, b, f: (h.transpose(0, 2, 1).reshape(2, -1) @ f).reshape(h.shape),
    "long": lambda h, w, b, f: (f.T @ jax.nn.relu(h.reshape(2, 12)).T).T.reshape(h.shape),
    "across": lambda h, w, b, f: h.transpose(0, 2, 1).reshape(h.shape),
    "residual": lambda h, w, b, f: h + jax.nn.relu(h @ w),
    "gate": lambda h, w, b, f: jnp.tanh(h) * (h @ w),
    "tanh": lambda h, w, b, f: jnp.tanh(h),
    "norm": lambda h, w, b, f: rowwise(h),
    "middle": lambda h, w, b, f: jnp.einsum("ts,nsc->ntc", w[:3, :3], h),
}
COMMON = ["dense", "transposed", "left", "bias", "relu", "leaky", "abs", "pool", "swap", "wide"]


@pytest.mark.parametrize("seed", range(4))
def test_random_functions_keep_every_bit(seed):
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(8):
        names = [*rng.choice(COMMON, 6), *rng.choice(list(STEPS), 3)]
        rng.shuffle(names)
        shared = rng.integers(0, len(names), 2)

        def fn(p, x, names=names, shared=shared):
            for i, name in enumerate(names):
                k = shared[0] if i == shared[1] else i
                x = STEPS[name](x, **p[k])
            return x

        one = {"w": jnp.ones((4, 4)), "b": jnp.ones(4), "f": jnp.ones((12, 12))}
        p = spread([one] * len(names), 1.0, seed)
        x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
        try:
            rw = jc.equalize(fn, p, x)
        except ValueError:
            continue
        found += 1
        assert rw.check(fn, x).absolute == 0, names
    assert found > 0
