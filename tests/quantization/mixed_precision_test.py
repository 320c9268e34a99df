"""Parameters in float32 that a model casts to bfloat16: rounded first, cast afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxopt_compress as jc
from tests.quantization.cases import normal

OPTIONS = {
    "rounded": {},
    "unrounded": {"backward": jc.backward(residuals="unrounded")},
    "backward": {"backward": "int8"},
}


def trained(c, loss, params, *args):
    """The loss and its gradients at parameters, and their compressed form."""
    tx = jc.compressed_training(optax.sgd(0.1), c)
    state = tx.init(params)
    lifted = jc.lift(loss, on_fallback="error")
    value, grads = jax.jit(jax.value_and_grad(lifted))(c.view(params, state), *args)
    updates, state = tx.update(grads, state, params)
    return value, updates, jc.compress(params, c, state=state)


@pytest.mark.parametrize("inputs", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["int8", "int7", "int4", "int2", "nf4", "float8_e4m3fn"])
def test_codes_in_training_are_those_stored(name, inputs):
    """The rows of an identity read the weight out as it is used."""
    params = {"w": jnp.asarray(normal(64, 32))}
    read = lambda params, x: x @ params["w"].astype(x.dtype)
    c = jc.quantize(name, activations=inputs)
    state = jc.compressed_training(optax.sgd(0.1), c).init(params)
    eye = jnp.eye(64, dtype=jnp.bfloat16)
    fn = jax.jit(jc.lift(read, on_fallback="error"))
    small = jc.compress(params, c, state=state)
    np.testing.assert_array_equal(fn(c.view(params, state), eye), fn(small, eye))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_of_a_short_dtype(options):
    """Flax's `Dense(dtype=bfloat16)` on float32 parameters trains on what is stored."""
    model = nn.Dense(32, dtype=jnp.bfloat16)
    x = jnp.asarray(normal(16, 64, seed=1))
    params = model.init(jax.random.key(0), x)
    loss = lambda params, x: jnp.sum(model.apply(params, x).astype(jnp.float32) ** 2)
    c = jc.quantize("int8", where="**/kernel", activations="int8", **options)
    value, updates, small = trained(c, loss, params, x)
    np.testing.assert_array_equal(value, jax.jit(jc.lift(loss, on_fallback="error"))(small, x))
    kernel = updates["params"]["kernel"]
    assert kernel.dtype == jnp.float32
    plain = jax.grad(loss)(params, x)["params"]["kernel"]
    # Rounding to 8 bits leaves directions as they are, to about a part in a hundred.
    cosine = -jnp.vdot(kernel, plain) / jnp.linalg.norm(kernel) / jnp.linalg.norm(plain)
    assert cosine > 0.999
