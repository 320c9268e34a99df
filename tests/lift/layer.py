"""A dense layer, dense and compressed."""

import jax.numpy as jnp

import jaxopt_compress as jc

W = jnp.sin(jnp.arange(16.0 * 24)).reshape(16, 24)
X = jnp.cos(jnp.arange(5.0 * 16)).reshape(5, 16)
PARAMS = {"mlp": {"w": W, "b": jnp.ones(24)}}
SMALL = jc.compress(PARAMS, jc.quantize("int8"))


def dense_layer(params, x):
    return jnp.tanh(x @ params["mlp"]["w"] + params["mlp"]["b"])
