"""Compressions that users write themselves, with states of their own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import as_compression


class ShrinkState(NamedTuple):
    factor: jax.Array


def shrink(factor: float, key: str) -> jc.Compression:
    """Multiplies one entry of a dict by a number: nothing of the library's own machinery."""

    def init(params: Any, *, uses: Any = None, stats: Any = None) -> ShrinkState:
        return ShrinkState(jnp.float32(factor))

    def update(state: ShrinkState, params: Any, *, grads: Any = None) -> ShrinkState:
        return ShrinkState(state.factor * 0.5)

    def apply(params: Any, state: ShrinkState, *, materialize: bool = True) -> Any:
        return {**params, key: params[key] * state.factor}

    return jc.Compression(init, update, apply, apply)


@pytest.fixture
def params():
    return {"a": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.ones((3, 2))}


def test_it_chains_with_built_in_ones(params):
    c = jc.chain(shrink(4.0, "a"), jc.quantize("int8", where="a"))
    state = c.init(params)
    view, small = c.apply(params, state), c.compress(params, state)
    np.testing.assert_array_equal(view["a"], jc.materialize(small)["a"])
    np.testing.assert_allclose(view["a"], 4 * params["a"], atol=4 / 127)


def test_it_joins_recipes(params):
    c = as_compression({"a": shrink(2.0, "a"), "b": jc.quantize("int4")})
    state = c.init(params)
    np.testing.assert_array_equal(c.apply(params, state)["a"], 2 * params["a"])
    assert isinstance(c.compress(params, state)["b"], jc.QuantizedArray)


@pytest.mark.parametrize("alone", [True, False])
def test_it_trains(params, alone):
    c = shrink(4.0, "a")
    c = c if alone else jc.chain(c, jc.quantize("int8", where="b"))
    tx = jc.compressed_training(optax.sgd(1.0), c)
    opt_state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, c.view(params, opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    np.testing.assert_array_equal(updates["a"], -4 * jnp.ones((4, 3)))
    np.testing.assert_array_equal(c.view(params, opt_state)["a"], 2 * params["a"])
