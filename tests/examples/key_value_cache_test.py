"""Attention on stored keys and values is attention, up to their rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import key_value_cache as example
from examples.models import smollm2

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", ["float32", "int8", "int4, groups, keys rotated"])
def test_attention_runs_on_what_is_stored(name):
    draw = lambda heads: jnp.asarray(RNG.normal(size=(2, 64, heads, 64)), jnp.float32)
    query, key, value = draw(4), draw(2), draw(2)
    # Each key head is of another size: a scale for all of them would lose the small one.
    key, value = (x * jnp.array([1.0, 1e-2])[:, None] for x in (key, value))
    store, rotated = example.variants()[name], "rotated" in name
    got = jax.jit(example.attend_on(store, rotated))(query, key, value)
    want = smollm2.attend(query, key, value)
    close = {"float32": 1e-5, "int8": 0.03}.get(name, 0.3)
    for head in range(4):
        error = jnp.linalg.norm((got - want)[:, :, head]) / jnp.linalg.norm(want[:, :, head])
        assert error < close
