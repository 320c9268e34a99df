"""Under JAX's stricter modes, a step of training and the stored form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.quantization.cases import assert_same_bits, normal

METHODS = {
    "entropy": jc.quantize("int8", bounds=jc.bounds.entropy()),
    "zero points": jc.quantize("uint4", group_size=16, symmetric=False, activations="int8"),
    "backward": jc.quantize("int8", activations="int8", backward="int8"),
    "nvfp4": jc.quantize("nvfp4"),
    "learned": jc.lsq("int4", activations=jc.activations("int8", "learned")),
    "dorefa": jc.dorefa("odd4"),
    "pruned": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
    "2:4": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"),
}
MODES = {
    "strict": {"jax_numpy_dtype_promotion": "strict"},
    "same rank": {"jax_numpy_rank_promotion": "raise"},
}


@pytest.fixture(params=["strict", pytest.param("same rank", marks=pytest.mark.slow)])
def mode(request):
    before = {name: getattr(jax.config, name) for name in MODES[request.param]}
    for name, value in MODES[request.param].items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


OTHERS = ("backward", "nvfp4", "pruned")
KINDS = [
    pytest.param(name, "float32", id=name, marks=pytest.mark.slow if name in OTHERS else [])
    for name in METHODS
]
SHORT = [
    pytest.param(name, "bfloat16", id=f"{name}-bfloat16") for name in ("zero points", "learned")
]


@pytest.mark.parametrize("name, dtype", [*KINDS, *SHORT])
def test_a_step(name, dtype, mode):
    del mode
    w, x = (jnp.asarray(normal(*s, seed=s[0]), dtype) for s in ((64, 32), (8, 64)))
    params = {"w": w}
    loss = lambda p, x: jnp.sum(jnp.square(x @ p["w"]))
    c = METHODS[name]
    tx = jc.compressed_training(optax.sgd(0.1), c, stats=jc.calibrate(loss, params, [x]))

    @jax.jit
    def step(params, state):
        grads = jax.grad(jc.lift(loss))(c.view(params, state), x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    small = jc.compress(params, c, state=state)
    assert_same_bits(jc.materialize(small)["w"], c.apply(params, state.compression)["w"])
    assert np.isfinite(jc.lift(loss)(small, x))
