"""A network that has to fit another one."""

import functools

import jax
import jax.numpy as jnp

KEY = jax.random.key(0)


def regression(seed=0, width=96):
    """Parameters, a loss and its data: a network that has to fit another one."""
    keys = jax.random.split(jax.random.key(seed), 4)
    init = lambda k, n, m: jax.random.normal(k, (n, m)) / n**0.5
    params = {
        "v": {"kernel": init(keys[0], 64, width)},
        "out": {"kernel": init(keys[1], width, 64)},
    }
    x = jax.random.normal(keys[2], (256, 64))
    y = jnp.sin(x @ init(keys[3], 64, 64) * 2)

    def loss(params, x, y):
        h = jnp.tanh(x @ params["v"]["kernel"])
        return jnp.mean((h @ params["out"]["kernel"] - y) ** 2)

    return params, functools.partial(loss, x=x, y=y)
