"""Small models whose parameters live in trees of several kinds, with their predictions."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

X = jax.random.normal(jax.random.key(0), (16, 8))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (8, 4)))


class Layers(NamedTuple):
    first: dict
    hole: None
    last: tuple


class Net(eqx.Module):
    first: jax.Array
    last: eqx.nn.Linear
    steps: jax.Array

    def __call__(self, x):
        return jax.vmap(self.last)(jnp.tanh(x @ self.first))


def weights():
    keys = jax.random.split(jax.random.key(2))
    return jax.random.normal(keys[0], (8, 8)) / 3, jax.random.normal(keys[1], (8, 4)) / 3


def dense(params):
    """The two weights and the bias of any of the trees below, and its prediction."""
    if isinstance(params, dict):
        first, last, bias = params["first"]["kernel"], params["last"]["kernel"], params["bias"]
    elif isinstance(params, Layers):
        first, (last, bias) = params.first["kernel"], params.last
    else:
        first, last, bias = params
    return jnp.tanh(X @ first) @ last + bias


def as_dict():
    first, last = weights()
    return {"first": {"kernel": first}, "last": {"kernel": last}, "bias": jnp.zeros(4)}, dense


def as_tuple():
    return (*weights(), jnp.zeros(4)), dense


def as_holes():
    first, last = weights()
    return Layers({"kernel": first, "none": None}, None, (last, jnp.zeros(4))), dense


def as_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 8, rngs=rngs)
            self.last = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    return state, lambda state: nnx.merge(graph, state)(X)


def as_equinox():
    first, _ = weights()
    net = Net(first, eqx.nn.Linear(8, 4, key=jax.random.key(3)), jnp.int32(7))
    return net, lambda net: net(X)


TREES = {
    "dict": as_dict,
    "tuple": as_tuple,
    "holes": as_holes,
    "nnx": as_nnx,
    "equinox": as_equinox,
}
