"""NaN and infinity pass through quantized products and their training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.quantization.learned import steady

dot = lambda params, x: x @ params["w"]


@pytest.mark.parametrize("group", [None, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("inputs", ["int8", "uint8", "nf4", "float8_e4m3fn", "pot4", "odd4"])
def test_a_row_with_nan_or_infinity_stays_so(inputs, group):
    """For those who watch losses and gradients; other rows are as they would be without it."""
    params, x = {"w": steady(0, 32, 16)}, steady(1, 6, 32)
    bad = x.at[0, 3].set(jnp.nan).at[1, 5].set(jnp.inf)
    small = jc.compress(params, jc.quantize("int8", group_size=group, activations=inputs))
    run = jax.jit(jc.lift(dot))
    y = run(small, bad)
    assert not jnp.any(jnp.isfinite(y[:2]))
    np.testing.assert_array_equal(y[2:], run(small, x)[2:])


def test_nan_passes_through_training():
    c = jc.quantize("int8", activations="int8", backward="int8")
    params, x = {"w": steady(0, 32, 16)}, steady(1, 6, 32)
    tx = jc.compressed_training(optax.sgd(0.1), c)
    state = tx.init(params)
    pull = jax.jit(lambda g: jax.vjp(jc.lift(dot), c.view(params, state), x)[1](g))
    grads, to_x = pull(jnp.full((6, 16), jnp.nan))
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert jnp.all(jnp.isnan(to_x)) and jnp.all(jnp.isnan(updates["w"]))
    # Steps of a weight that has become NaN do not hide it.
    _, state = tx.update(grads, state, {"w": params["w"].at[2, 3].set(jnp.nan)})
    assert jnp.all(jnp.isnan(c.view(params, state)["w"].materialize()[:, 3]))
