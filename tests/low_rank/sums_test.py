"""Factors beside entries, and adapters beside frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.plus_sparse import go_dec, robust_pca

RNG = np.random.default_rng(0)


def low_and_sparse(m, n, rank, share):
    """A matrix of a rank, and entries at random places of either sign."""
    low = RNG.standard_normal((m, rank)) @ RNG.standard_normal((rank, n))
    sparse = np.where(RNG.random((m, n)) < share, RNG.choice([-9.0, 9.0], (m, n)), 0)
    return low.astype(np.float32), sparse.astype(np.float32)


@pytest.mark.ci
def test_both_parts_are_found():
    low, sparse = low_and_sparse(40, 30, 2, 0.05)
    count = int(np.count_nonzero(sparse))
    u, v, mask = go_dec(jnp.asarray(low + sparse), 2, count, rounds=30)
    np.testing.assert_allclose(u @ v, low, atol=1e-3)
    np.testing.assert_array_equal(mask, sparse != 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_in_16_bits_are_those_of_their_parts(dtype):
    low, sparse = low_and_sparse(8, 6, 1, 0.05)
    w = jnp.asarray(low + sparse, dtype)
    c = jc.low_rank_plus_sparse(rank=2, sparsity=0.8)
    small = jc.compress({"w": w}, c, layout="in,out")["w"]
    parts = [np.asarray(part.materialize(), np.float32) for part in small.parts]
    want = jnp.asarray(parts[0] + parts[1], dtype)
    np.testing.assert_array_equal(small.materialize(), want)


@pytest.mark.ci
def test_robust_pca_finds_rank_and_places():
    low, sparse = low_and_sparse(40, 30, 2, 0.05)
    got, rest = robust_pca(jnp.asarray(low + sparse))
    np.testing.assert_allclose(got, low, atol=1e-3)
    np.testing.assert_allclose(rest, sparse, atol=1e-3)
    for scale in (1, 1e-3, 1e3):
        w = jnp.asarray((low + sparse) * scale)
        small = jc.compress({"w": w}, jc.low_rank_plus_sparse(), layout="in,out")["w"]
        assert small.parts[0].rank == 2
        np.testing.assert_allclose(small.materialize(), w, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.ci
def test_more_rounds_lose_no_more():
    w = jnp.asarray(RNG.standard_normal((2, 24, 16)) ** 3, jnp.float32)

    def lost(rounds):
        c = jc.low_rank_plus_sparse(rank=3, sparsity=0.9, rounds=rounds)
        small = jc.compress({"w": w}, c, layout="in,out")["w"]
        return np.linalg.norm(np.asarray(small.materialize()) - np.asarray(w), axis=(-2, -1))

    assert (lost(20) <= lost(1) * 1.0001).all()
    alone = jc.compress({"w": w}, jc.low_rank(rank=3), layout="in,out")["w"].materialize()
    assert (lost(20) < np.linalg.norm(np.asarray(alone - w), axis=(-2, -1))).all()


@pytest.mark.slow
@pytest.mark.ci
def test_axes_in_any_order():
    w = jax.random.normal(jax.random.key(0), (3, 6, 4))
    fn = lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"])
    x = jax.random.normal(jax.random.key(1), (2, 6))
    c = jc.low_rank_plus_sparse(rank=2, sparsity=0.8)
    small = jc.compress({"w": w}, c, uses=jc.uses(fn, {"w": w}, x))
    got = jax.jit(jc.lift(fn, on_fallback="error"))(small, x)
    np.testing.assert_allclose(got, fn(jc.materialize(small), x), rtol=1e-4, atol=1e-5)


def test_adapters_train_and_what_they_stand_beside_does_not():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (16, 8))}
    moved = params["w"] + jnp.outer(jnp.linspace(-1, 1, 16), jnp.linspace(0, 1, 8))
    x = jax.random.normal(keys[1], (64, 16))
    loss = lambda p: jnp.mean((x @ p["w"] - x @ moved) ** 2)
    c = jc.chain(jc.quantize("int8"), jc.lora(1))
    tx = jc.compressed_training(optax.adam(0.05), c, layout="in,out")
    state, trained = tx.init(params), params

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(c.view(params, state)), state, params)
        return optax.apply_updates(params, updates), state

    before = float(loss(c.view(params, state)))
    for _ in range(300):
        trained, state = step(trained, state)
    np.testing.assert_array_equal(trained["w"], params["w"])
    small = jc.compress(params, c, state=state)
    np.testing.assert_array_equal(jc.materialize(small)["w"], c.view(params, state)["w"])
    assert [type(x).__name__ for x in small["w"].parts] == ["QuantizedArray", "LowRankArray"]
    # What is left is the rounding to 8 bits.
    assert float(loss(jc.materialize(small))) < 1e-2 * before
    run = jc.lift(lambda p: x @ p["w"], on_fallback="error")(small)
    np.testing.assert_allclose(run, x @ jc.materialize(small)["w"], atol=1e-4)


@pytest.mark.ci
def test_training_starts_at_the_frozen_parameter():
    small = jc.compress({"w": jnp.eye(4)}, jc.quantize("int8"), layout="in,out")
    adapted = jc.compress(small, jc.lora(2), layout="in,out")
    np.testing.assert_array_equal(jc.materialize(adapted)["w"], jc.materialize(small)["w"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jc.low_rank_plus_sparse(rank=2), "rank=2 and sparsity=None: give both"),
        (lambda: jc.low_rank_plus_sparse(0, 0.5), "rank=0; a rank is at least 1"),
        (lambda: jc.low_rank_plus_sparse(1, 1.0), "sparsity=1.0; it is the share of zeros"),
        (lambda: jc.lora(0), "rank=0; a rank is at least 1"),
        (
            lambda: jc.compress({"w": jnp.ones((4, 3))}, jc.lora(4), layout="in,out"),
            r"rank=4 is above the limit 3 of 'w' of shape \(4, 3\)",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
