"""float32 parameters where JAX's default types have 64 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.quantization.cases import assert_same_bits

METHODS = {
    **{name: jc.quantize(name) for name in ("int4", "int3", "mxfp4", "nf4", "pot4", "ternary")},
    "zero points": jc.quantize("uint4", group_size=8, symmetric=False),
    "squared error": jc.quantize("int4", bounds=jc.bounds.mse()),
    "percentile": jc.quantize("int4", bounds=jc.bounds.percentile(99)),
    "entropy": jc.quantize("int4", bounds=jc.bounds.entropy()),
    "activations": jc.quantize("int8", activations="int8", backward="int8"),
    "learned": jc.lsq("int4"),
    "pruned": jc.prune(jc.scores.magnitude(), jc.schedules.polynomial(0.5, 0, 10)),
    "low rank": jc.low_rank(rank=4),
}


OTHERS = ("int4", "nf4", "pot4", "ternary", "percentile", "entropy", "low rank")
KINDS = [pytest.param(name, marks=pytest.mark.slow if name in OTHERS else []) for name in METHODS]


@pytest.mark.parametrize("name", KINDS)
def test_types_and_bits_stay_those_of_float32(name):
    with jax.enable_x64(True):
        c, params = METHODS[name], {"w": jax.random.normal(jax.random.key(0), (64, 32), "float32")}
        tx = jc.compressed_training(optax.sgd(np.float32(0.1)), c)

        @jax.jit
        def step(params, state, x):
            loss = jc.lift(lambda params: jnp.sum((x @ params["w"]) ** 2))
            grads = jax.grad(loss, allow_int=True)(c.view(params, state))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(params)
        types = jax.eval_shape(lambda: (params, state))
        params, state = step(params, state, jnp.ones((4, 64), "float32"))
        assert jax.eval_shape(lambda: (params, state)) == types
        small = jc.compress(params, c, state=state)
        applied = c.apply(params, state.compression)["w"]
        assert applied.dtype == small["w"].dtype == jnp.float32
        assert_same_bits(jc.materialize(small)["w"], applied)


@pytest.mark.parametrize("name", ["int8", "mxfp4"])
def test_values_beyond_steps_are_refused(name):
    with jax.enable_x64(True):
        params = {"w": jnp.full((32, 2), 1.0).at[1, 1].set(1e300)}
        with pytest.raises(ValueError, match=r"'w' .* beyond float32's range"):
            jc.compress(params, jc.quantize(name))
