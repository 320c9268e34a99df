"""Tensor trains and sums of Kronecker products, beside decompositions by NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.tensor_train import digits_of, tensor_train_of, train_product

RNG = np.random.default_rng(0)
ROWS, COLUMNS = (3, 4, 2), (2, 2, 3)


def unfolded(w, rows, columns, k):
    """The matrix between the first ``k`` pairs of digits and the others."""
    d = len(rows)
    w = np.asarray(w, np.float64).reshape(*rows, *columns)
    w = w.transpose([x for i in range(d) for x in (i, d + i)])
    return w.reshape(math.prod(rows[:k]) * math.prod(columns[:k]), -1)


def tails(w, ranks, rows=ROWS, columns=COLUMNS):
    """The squares that each cut alone loses at least."""
    own = [unfolded(w, rows, columns, k) for k in range(1, len(rows))]
    values = [np.linalg.svd(x, compute_uv=False) for x in own]
    return [np.sum(s[r:] ** 2) for s, r in zip(values, ranks, strict=True)]


@pytest.mark.ci
def test_errors_lie_between_the_bounds_of_the_cuts():
    w = jnp.asarray(RNG.standard_normal((24, 12)), jnp.float32)
    cores = tensor_train_of(w, ROWS, COLUMNS, ranks=(4, 3))
    assert [x.shape for x in cores] == [(1, 3, 2, 4), (4, 4, 2, 3), (3, 2, 3, 1)]
    # The product of all cores in one sum, by NumPy.
    made = np.einsum("aixb,bjyc,ckzd->ijkxyz", *map(np.asarray, cores)).reshape(24, 12)
    np.testing.assert_allclose(train_product(cores, 1e30), made, atol=1e-5)
    lost = np.sum((made - np.asarray(w)) ** 2)
    bounds = tails(w, (4, 3))
    assert max(bounds) * (1 - 1e-5) <= lost <= sum(bounds) * (1 + 1e-5)
    full = tensor_train_of(w, ROWS, COLUMNS, ranks=(99, 99))
    np.testing.assert_allclose(train_product(full, 1e30), w, atol=1e-5)


@pytest.mark.ci
def test_two_cores_are_the_nearest_sum_of_kronecker_products():
    w = jnp.asarray(RNG.standard_normal((12, 15)), jnp.float32)
    shape = ((3, 4), (5, 3))
    small = jc.compress({"w": w}, jc.kronecker(rank=2, shape=shape), layout="in,out")["w"]
    a = np.asarray(small.cores[0]).reshape(3, 5, 2)
    b = np.asarray(small.cores[1]).reshape(2, 4, 3)
    terms = sum(np.kron(a[:, :, r], b[r]) for r in range(2))
    np.testing.assert_allclose(small.materialize(), terms, atol=1e-5)
    (least,) = tails(w, (2,), *shape)
    np.testing.assert_allclose(np.sum((terms - np.asarray(w)) ** 2), least, rtol=1e-4)


@pytest.mark.ci
def test_the_error_that_was_asked_for():
    w = jnp.asarray(RNG.standard_normal((2, 24, 12)) * [[[1.0]], [[100.0]]], jnp.float32)
    for error in (0.9, 0.3):
        c = jc.tensor_train(error=error, shape=(ROWS, COLUMNS), stack=1)
        small = jc.compress({"w": w}, c, layout="in,out")["w"]
        missed = np.linalg.norm(small.materialize() - w, axis=(1, 2))
        assert (missed <= error * np.linalg.norm(w, axis=(1, 2))).all()
    # A rank less at the second cut alone would lose more than the error allows for it.
    ranks = small.sizes.ranks
    assert tails(w[0], (ranks[1], ranks[2] - 1))[1] > 0.3**2 / 2 * np.sum(w[0] ** 2) or tails(
        w[1], (ranks[1], ranks[2] - 1)
    )[1] > 0.3**2 / 2 * np.sum(w[1] ** 2)


@pytest.mark.ci
@pytest.mark.parametrize("int8", [False, True])
def test_products_and_lookups_meet_cores(int8):
    """Of a table whose digits have more rows and columns than it, and of its transpose."""
    table = jnp.asarray(RNG.standard_normal((58, 30)), jnp.float32)
    c = jc.tensor_train(rank=2, shape=((4, 4, 4), (2, 4, 4)))
    small = jc.compress({"t": table}, c, layout="in,out")
    small = jc.compress(small, jc.quantize("int8"), layout="in,out") if int8 else small
    assert small["t"].cut == (6, 2)
    x, y = (jnp.asarray(RNG.standard_normal(n), jnp.float32) for n in ((3, 58), (2, 3, 30)))
    ids = jnp.array([[0, 57, -1], [99, 16, 15]])
    cases = [
        (lambda p, x: x @ p["t"], x),
        (lambda p, y: y @ p["t"].T, y),
        (lambda p, x: jnp.einsum("kn,bk->nb", p["t"], x), x),
        (lambda p, y: jnp.einsum("kn,bjn->kjb", 2.0 * p["t"], y), y),
        (lambda p, ids: p["t"][ids], ids),
        (lambda p, ids: p["t"].at[ids].get(mode="fill", fill_value=0), ids),
        (lambda p, ids: jnp.take(p["t"], ids, axis=0, mode="clip"), ids),
    ]
    dense = jc.materialize(small)
    for fn, given in cases:
        got = jax.jit(jc.lift(fn, on_fallback="error"))(small, given)
        # Sums of at most 58 products of entries of size 1.
        np.testing.assert_allclose(got, fn(dense, given), atol=1e-4)
        text = str(jax.make_jaxpr(jc.lift(fn))(small, given))
        assert "[58,30]" not in text and "[64,32]" not in text


@pytest.mark.ci
def test_stacks_and_scans():
    w = jnp.asarray(RNG.standard_normal((3, 16, 16)), jnp.float32)
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x = jnp.asarray(RNG.standard_normal((5, 16)), jnp.float32)
    c = jc.kronecker(rank=2)
    small = jc.compress({"w": w}, c, uses=jc.uses(fn, {"w": w}, x))
    got = jax.jit(jc.lift(fn, on_fallback="error"))(small, x)
    np.testing.assert_allclose(got, fn(jc.materialize(small), x), atol=1e-5)


def test_digits():
    assert digits_of(384, 3) == (8, 6, 8)
    for size, count in ((30522, 3), (1, 2), (7, 2), (97, 4), (1000, 2)):
        own = digits_of(size, count)
        assert len(own) == count and size <= math.prod(own) < 2 * size
        # No row of the first digit is without use.
        assert math.prod(own) - math.prod(own[1:]) < size


@pytest.mark.parametrize(
    ("call", "shape", "message"),
    [
        (lambda: jc.tensor_train(), (4, 4), "give one of rank, error and ratio"),
        (lambda: jc.tensor_train(rank=0), (4, 4), "rank=0; a rank is at least 1"),
        (lambda: jc.kronecker(rank=1, shape=((2, 2, 2), (2, 2, 2))), (8, 8), "two of each"),
        (
            lambda: jc.tensor_train(rank=1, shape=((2, 3), (2, 2))),
            (8, 4),
            r"shape=.* has 6 rows, and 'w' of shape \(8, 4\) has 8: digits .* such as \(4, 2\)",
        ),
        (lambda: jc.tensor_train(rank=1), (2, 3, 3, 4), "trains need one input and one"),
        (lambda: jc.tensor_train(ratio=1e3), (8, 8), r"ratio=1000.0 leaves 0 entries for 'w'"),
    ],
)
def test_refusals(call, shape, message):
    with pytest.raises(ValueError, match=message):
        call().init({"w": jnp.ones(shape)})


def test_all_that_are_no_matrices_are_named():
    fn = lambda p, x: jnp.einsum("bi,iho->bho", x, p["q"]) + jnp.einsum("bi,iho->bho", x, p["v"])
    params = {"q": jnp.ones((4, 2, 3)), "v": jnp.ones((4, 2, 3))}
    each = r"of shape \(4, 2, 3\) has 2 output axes \(-2, -1\)"
    with pytest.raises(ValueError, match=f"'q' {each}; 'v' {each}: trains need one input and one"):
        jc.kronecker(ratio=2.0).init(params, uses=jc.uses(fn, params, jnp.ones((1, 4))))


def test_many_digits_are_found_without_trying_all():
    for size, count in ((65536, 16), (30522, 7)):
        digits = digits_of(size, count)
        assert len(digits) == count and size <= math.prod(digits) < 2 * size


def test_lookups_in_bfloat16_are_rounded_once():
    w = jnp.asarray(RNG.standard_normal((60, 32)), jnp.bfloat16)
    small = jc.compress({"w": w}, jc.tensor_train(rank=8), layout="in,out")
    ids = jnp.arange(60)
    got = jc.lift(lambda p, i: p["w"][i])(small, ids).astype(jnp.float32)
    want = small["w"].materialize().astype(jnp.float32)
    # Sums in another order may round to the other neighbour.
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-16)
    assert (got != want).mean() < 0.01
