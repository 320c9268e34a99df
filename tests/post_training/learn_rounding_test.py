"""Codes that are chosen together, against a search over all choices; and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def block(params, x):
    """Two products, with a residual connection around them."""
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


X = [normal(10 + i, 32, 8) @ normal(9, 8, 8) / 3 for i in range(2)]
PARAMS = {"up": normal(0, 8, 12), "down": normal(1, 12, 8)}


def small(c):
    uses, stats = jc.uses(block, PARAMS, X[0]), jc.calibrate(block, PARAMS, X)
    return jc.compress(PARAMS, c, uses=uses, stats=stats)


def error(params, batches):
    gaps = [jc.lift(block)(params, x) - block(PARAMS, x) for x in batches]
    return float(sum(jnp.sum(gap**2) for gap in gaps))


@pytest.mark.ci
def test_outputs_of_a_block_are_nearer_than_by_one_product_after_the_other():
    """Also on inputs that nothing was learned from; steps and zero points stay."""
    before = small(jc.quantize("int2", group_size=4, symmetric=False))
    after = jc.learn_rounding(block, PARAMS, before, X, steps=150)
    unseen = [normal(30, 256, 8) @ normal(9, 8, 8) / 3]
    assert error(after, X) < 0.7 * error(before, X)
    assert error(after, unseen) < error(before, unseen)
    for name in PARAMS:
        jax.tree.map(
            np.testing.assert_array_equal,
            (before[name].scale, before[name].zero),
            (after[name].scale, after[name].zero),
        )
        # One of the two levels next to the entry, unless the range ends before it.
        w, step = PARAMS[name], np.asarray(jnp.repeat(before[name].scale, 4, 0))
        inside = np.abs(before[name].materialize() - w) < step
        assert np.all(np.abs(after[name].materialize() - w)[inside] < step[inside] * 1.001)
        assert np.any(after[name].unpacked() != before[name].unpacked())
    assert jax.tree.structure(after) == jax.tree.structure(before)


@pytest.mark.slow
def test_few_codes_are_as_good_as_the_best_of_all_choices():
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    params = {"w": normal(3, 4, 2)}
    x = normal(4, 64, 2) @ normal(5, 2, 4)
    nearest = jc.compress(params, jc.quantize("int3"), uses=jc.uses(fn, params, x))
    found = jc.learn_rounding(fn, params, nearest, [x], steps=400)
    leaf = nearest["w"]
    codes, values = np.asarray(leaf.unpacked(), int), np.asarray(leaf.materialize())
    step = np.broadcast_to(np.asarray(leaf.scale), codes.shape)
    side = np.sign(np.asarray(params["w"]) - values)
    far = np.clip(codes + side, -4, 3) * step
    wrong = lambda w: float(jnp.sum((fn({"w": w}, x) - fn(params, x)) ** 2))
    every = [
        wrong(jnp.asarray(np.where(np.reshape(up, codes.shape), far, values), jnp.float32))
        for up in itertools.product([False, True], repeat=codes.size)
    ]
    own = wrong(found["w"].materialize())
    # Descent need not find the best of 256, but one of the best, and far from the nearest.
    assert own <= np.quantile(every, 0.02)
    assert own < 0.8 * wrong(values)


def test_what_is_no_array_of_codes_is_named():
    tree = {
        "up": jc.compress({"up": PARAMS["up"]}, jc.quantize("nf4"))["up"],
        "down": PARAMS["down"],
    }
    with pytest.raises(ValueError, match="'down' is a ArrayImpl"):
        jc.learn_rounding(block, PARAMS, tree, X, where="down")
    with pytest.raises(ValueError, match="of integers, with a code for each entry"):
        jc.learn_rounding(block, PARAMS, tree, X)
    with pytest.raises(ValueError, match="outputs over all batches is nan"):
        jc.learn_rounding(block, PARAMS, small(jc.quantize("int4")), [X[0] * jnp.nan])
    with pytest.raises(ValueError, match="0 batches"):
        jc.learn_rounding(block, PARAMS, small(jc.quantize("int4")), [])
