"""States and compressed trees through `flax.serialization`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import jaxopt_compress as jc

PARAMS = {"w": jax.random.normal(jax.random.key(0), (8, 16)), "b": jnp.zeros(16)}
METHODS = {
    "chain": jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.polynomial(0.75, begin=1, end=5)),
        jc.quantize("int8"),
    ),
    "lsq": jc.lsq("int4", group_size=4),
    "w8a8": jc.quantize("int8", activations="int8"),
    "low_rank": jc.chain(jc.low_rank(rank=2), jc.quantize("int8")),
    "recipe": {"w": jc.quantize("nf4", group_size=8, key=jax.random.key(1))},
}


@pytest.mark.ci
@pytest.mark.parametrize("name", METHODS)
def test_states_and_trees_return(name):
    jc.register_flax_serialization()
    tx = jc.compressed_training(optax.adam(1e-3), METHODS[name])
    state = tx.init(PARAMS)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    other = jax.tree.map(lambda x: x if is_key(x) else (x + 1).astype(x.dtype), state)
    if name == "recipe":  # keys are no arrays that msgpack knows
        state, other = state._replace(compression=()), other._replace(compression=())
    small = jc.compress(PARAMS, METHODS[name])
    blank = jax.tree.map(jnp.zeros_like, small)
    for value, target in ((state, other), (small, blank)):
        back = serialization.from_bytes(target, serialization.to_bytes(value))
        assert jax.tree.structure(back) == jax.tree.structure(value)
        jax.tree.map(np.testing.assert_array_equal, back, value)


def test_fields_of_another_form_are_refused():
    jc.register_flax_serialization()
    plain, shifted = (
        jc.compress(PARAMS, jc.quantize("int8", symmetric=symmetric)) for symmetric in (True, False)
    )
    with pytest.raises(ValueError, match="zero of QuantizedArray are on one side only"):
        serialization.from_bytes(plain, serialization.to_bytes(shifted))


def test_codes_of_another_format_are_refused():
    jc.register_flax_serialization()
    some, other = (jc.compress(PARAMS, jc.quantize(name)) for name in ("nf4", "float4_e2m1fn"))
    with pytest.raises(
        ValueError, match=r"target is QuantizedArray\(.*nf4.*data are .*float4_e2m1"
    ):
        serialization.from_bytes(some, serialization.to_bytes(other))
    with pytest.raises(ValueError, match="the data are ndarray"):
        serialization.from_bytes(some, serialization.to_bytes(PARAMS))
