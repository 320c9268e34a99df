"""Products of a quantized weight of every kind, and their derivatives."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxopt_compress as jc

matmul = lambda params, x: x @ params["w"]


def image(params, x):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=names)


def stack(params, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return lax.scan(layer, x, params["w"])[0]


def einsum(spec):
    return lambda params, x: jnp.einsum(spec, x, params["w"])


# A function, the shapes of its weight and activation, and options of the weight.
PRODUCTS = {
    "matmul": (matmul, (32, 16), (24, 32), {}),
    "weight first": (lambda params, x: params["w"] @ x.T, (16, 32), (24, 32), {}),
    "heads": (einsum("btd,dhk->bthk"), (32, 4, 8), (3, 8, 32), {}),
    "experts": (einsum("ebd,edf->fbe"), (3, 32, 8), (3, 8, 32), {}),
    "two summed": (einsum("bhk,kdh->bd"), (8, 12, 4), (24, 4, 8), {}),
    "stack": (stack, (3, 16, 16), (24, 16), {}),
    "image": (image, (3, 3, 8, 16), (4, 6, 6, 8), {}),
    "groups": (matmul, (32, 16), (24, 32), {"group_size": 8}),
    "nf4": (matmul, (32, 16), (24, 32), {"format": "nf4"}),
    "zero points": (matmul, (32, 16), (24, 32), {"symmetric": False}),
}


def view_of(c, params, **known):
    """What a forward pass uses as training starts."""
    return c.view(params, jc.compressed_training(optax.sgd(0.1), c, **known).init(params))


def derivatives(fn, view, x, g):
    """Cotangents of weights and activation."""
    held, rest = jc.partition(view)
    run = lambda held, x: jc.lift(fn, on_fallback="error")(jc.combine(held, rest), x)
    return jax.vjp(run, held, x)[1](g)


def distance(got, want):
    """The largest relative error of any of the arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
