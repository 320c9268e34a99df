"""What tests of learned quantization share."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_compress as jc

ANSWERS = np.load(Path(__file__).parents[1] / "known_answers" / "gradients.npz")
X, COTANGENT = jnp.asarray(ANSWERS["x"]), jnp.asarray(ANSWERS["cotangent"])


def answer(case: str) -> dict[str, np.ndarray]:
    """The arrays of one case."""
    return {k.split("/")[1]: ANSWERS[k] for k in ANSWERS if k.startswith(f"{case}/")}


def with_learned(state: Any, **parts: Any) -> Any:
    """A state of the parameter ``w`` with other learned parts."""
    return state._replace(learned={"w": parts})


def views(c: jc.Compression, state: Any) -> Any:
    """``view(params, learned)``, as training takes it."""
    return lambda params, learned: c.view(params, state._replace(learned=learned))


def knowing(c: jc.Compression, stats: Any) -> jc.Compression:
    """The compression with statistics for its ``init``."""
    return c._replace(init=lambda params, *, uses=None, **_: c.init(params, uses=uses, stats=stats))


def steady(seed: int, *shape: int) -> jax.Array:
    """Normal values."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """Two layers; the second one meets activations that are never negative."""
    return jax.nn.relu(x @ params["a"]["w"]) @ params["b"]["w"]


def mlp_params(seed: int = 0) -> Any:
    """Of widths 8, 16 and 4."""
    return {"a": {"w": steady(seed, 8, 16) / 3}, "b": {"w": steady(seed + 1, 16, 4) / 4}}


def train(
    c: Any,
    tx: Any,
    opt_state: Any,
    params: Any,
    x: Any,
    y: Any,
    steps: int = 40,
    forward: Any = mlp,
) -> Any:
    """Parameters, optimizer state, and the losses of some steps of training."""
    forward = jc.lift(forward, on_fallback="error")
    loss = lambda view: jnp.mean((forward(view, x) - y) ** 2)

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    values = []
    for _ in range(steps):
        params, opt_state, value = step(params, opt_state)
        values.append(float(value))
    return params, opt_state, values
