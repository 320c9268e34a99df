"""Ranks by error, by bytes, and within a budget that several parameters share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_compress as jc
from jaxopt_compress.numerics.rank_budget import Offer, ranks_within

RNG = np.random.default_rng(0)


def decaying(m, n, power):
    """A matrix with singular values ``i ** -power``."""
    q = lambda k: np.linalg.qr(RNG.standard_normal((k, k)))[0]
    r = min(m, n)
    s = np.arange(1, r + 1.0) ** -power
    return jnp.asarray((q(m)[:, :r] * s) @ q(n)[:r], jnp.float32)


@pytest.mark.parametrize("error", [0.5, 0.1])
def test_the_smallest_rank_of_an_error(error):
    w = decaying(12, 9, 1.5)
    small = jc.compress({"w": w}, jc.low_rank(error=error), layout="in,out")["w"]
    reached = lambda r: np.linalg.norm(w - truncated(w, r)) / np.linalg.norm(w)
    assert reached(small.rank) <= error < reached(small.rank - 1)


def truncated(w, rank):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_a_shrunk_matrix_is_stored_by_its_numerical_rank():
    """As of steps of the nuclear norm: small singular values are 0 up to rounding."""
    w = truncated(decaying(12, 9, 1.0), 4)
    small = jc.compress({"w": jnp.asarray(w)}, jc.low_rank(error=1e-5), layout="in,out")["w"]
    assert small.rank == 4
    np.testing.assert_allclose(small.materialize(), w, atol=1e-6)


@pytest.mark.ci
def test_bytes_of_one_parameter():
    params = {"w": decaying(12, 10, 1.0), "half": decaying(12, 10, 1.0).astype(jnp.bfloat16)}
    ranks = lambda **given: {
        k: x.rank for k, x in jc.compress(params, jc.low_rank(**given), layout="in,out").items()
    }
    # One rank takes 22 entries of the 120.
    assert ranks(ratio=2.0) == {"w": 2, "half": 2}
    assert ranks(bytes=3 * 88 + 87) == {"w": 3, "half": 7}
    with pytest.raises(ValueError, match=r"ratio=6.0 leaves 40 bytes for 'half' .* takes 44; ask"):
        jc.compress(params, jc.low_rank(ratio=6.0), layout="in,out")


def brute_force(offers, budget):
    """The least sum of losses of all choices that fit."""
    every = itertools.product(*(range(1, len(o.losses)) for o in offers))
    fits = (r for r in every if sum(o.cost * k for o, k in zip(offers, r, strict=True)) <= budget)
    return min(sum(o.losses[k] for o, k in zip(offers, r, strict=True)) for r in fits)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=3))
def test_no_other_ranks_of_the_same_cost_lose_less(rows):
    """Of equal costs per rank greedy is exact; nothing is whole below all ranks."""
    offers = []
    for squares in rows:
        steps = np.sort(squares)[::-1]
        losses = np.append(np.cumsum(steps[::-1])[::-1], 0).astype(float)
        offers.append(Offer(losses, cost=3, whole=1000))
    for budget in range(3 * len(offers), 12 * len(offers) + 1, 3):
        ranks = ranks_within(offers, budget)
        got = sum(o.losses[r] for o, r in zip(offers, ranks, strict=True))
        assert sum(3 * r for r in ranks) <= budget
        assert got == brute_force(offers, budget)


@pytest.mark.ci
def test_a_budget_gives_ranks_to_the_flat_and_keeps_what_needs_them_all():
    params = {
        "steep": decaying(16, 16, 3.0),
        "flat": decaying(16, 16, 0.4),
        "stack": jnp.stack([decaying(16, 8, 1.0) * 100, decaying(16, 8, 1.0)]),
    }
    c = jc.low_rank(budget=jc.bytes(0.7))
    with pytest.warns(jc.AssumedLayout):
        small = jc.compress(params, c)
    assert jc.nbytes(small) <= 0.7 * jc.nbytes(params)
    assert small["steep"].rank < small["stack"].rank
    assert small["flat"] is params["flat"]

    uniform = jc.compress(params, jc.low_rank(ratio=1 / 0.7), layout="in,out")
    relative = lambda p, k: float(
        jnp.sum((jc.materialize(p)[k] - params[k]) ** 2) / jnp.sum(params[k] ** 2)
    )
    lost = lambda p: sum(relative(p, k) for k in ("steep", "flat"))
    assert lost(small) < 0.7 * lost(uniform)


@pytest.mark.ci
def test_a_whole_parameter_is_quantized_as_one():
    params = {"a": decaying(8, 8, 0.1), "b": decaying(8, 8, 2.0)}
    c = jc.chain(jc.low_rank(budget=jc.bytes(0.8)), jc.quantize("int8"))
    small = jc.compress(params, c, layout="in,out")
    kinds = {k: type(x).__name__ for k, x in small.items()}
    assert kinds == {"a": "QuantizedArray", "b": "LowRankArray"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jc.low_rank(error=1.0), ValueError, r"error=1.0; .*\[0, 1\)"),
        (lambda: jc.low_rank(ratio=0.5), ValueError, "ratio=0.5; .* at least 1"),
        (
            lambda: jc.low_rank(budget=0.5),
            TypeError,
            r"budget=0.5; there are jaxopt_compress",
        ),
        (
            lambda: jc.low_rank(budget=jc.bytes(0.1)).init({"w": jnp.ones((4, 4))}),
            ValueError,
            r"budget=jaxopt_compress.bytes\(0.1\)\): rank 1 of each takes 32, and .* 6",
        ),
        (
            lambda: jax.jit(jc.low_rank(error=0.5).init)({"w": jnp.ones((4, 4))}),
            ValueError,
            "error=0.5 needs the values of 'w'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
def test_errors_name_path_shape_and_what_works(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_budget_that_nothing_fits_is_refused_from_shapes():
    """By a plan, which has no values to decompose."""
    fn, x = (lambda params, x: x @ params["w"]), jnp.ones((2, 8))
    params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    with pytest.raises(ValueError, match=r"rank 1 of each takes 48, and the budget is 12"):
        jc.plan(fn, params, jc.low_rank(budget=jc.bytes(0.1)), x)
    jc.plan(fn, params, jc.low_rank(budget=jc.bytes(0.5)), x)


@pytest.mark.ci
def test_a_budget_of_operations_spares_what_meets_few_positions():
    """Two kernels of one spectrum; the first meets nine times as many positions."""
    k = decaying(54, 6, 0.5).reshape(3, 3, 6, 6)

    def fn(p, x):
        run = lambda x, w, s: jax.lax.conv_general_dilated(
            x, w, (s, s), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return run(run(x, p["wide"], 1), p["deep"], 3)

    params, x = {"wide": k, "deep": k}, jnp.ones((1, 9, 9, 6))
    uses = jc.uses(fn, params, x)
    small = jc.compress(params, jc.low_rank(budget=jc.flops(0.6)), uses=uses)
    flops = lambda path: uses[path][0].flops
    share = lambda w: w.rank * (54 + 6) / (54 * 6) if isinstance(w, jc.LowRankArray) else 1.0
    assert flops("wide") == 9 * flops("deep")
    total = sum(share(small[path]) * flops(path) for path in params)
    assert 0.4 < total / (flops("wide") + flops("deep")) <= 0.6
    assert share(small["wide"]) < share(small["deep"])
    with pytest.raises(ValueError, match=r"needs the operations of 'deep' .* pass uses="):
        jc.low_rank(budget=jc.flops(0.6)).init(params)


def test_a_budget_of_what_a_call_reads_leaves_tables_whole_that_are_looked_up():
    params = {k: decaying(16, 16, 0.5) for k in ("table", "a", "b")}
    fn = lambda p, ids: p["table"][ids] @ p["a"] @ p["b"]
    uses = jc.uses(fn, params, jnp.arange(3))
    small = jc.compress(params, jc.low_rank(budget=jc.traffic(0.6)), uses=uses)
    assert small["table"] is params["table"]
    read = jc.nbytes({k: small[k] for k in "ab"})
    assert 0.4 < read / (2 * params["a"].nbytes) <= 0.6
    # 1228 of 2048 bytes.
    chip = jc.planning.Chip("slow", 819e6, 1e12, 1e12, 1e9, "nowhere")
    budget = jc.traffic(microseconds=1.5, chip=chip)
    small = jc.compress(params, jc.low_rank(budget=budget), uses=uses)
    assert 0.8 * 1228 < jc.nbytes({k: small[k] for k in "ab"}) <= 1228
    with pytest.raises(ValueError, match=r"budget=jaxopt_compress.traffic\(most=81.9\)\): rank 1"):
        jc.low_rank(budget=jc.traffic(microseconds=0.1, chip=chip)).init(params, uses=uses)
