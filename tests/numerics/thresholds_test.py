import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_compress.numerics.patterns import n_m_mask
from jaxopt_compress.numerics.ranking import among, nonnegative
from jaxopt_compress.numerics.thresholds import largest, largest_mask, largest_masks

LAWS = settings(deadline=None, derandomize=True, max_examples=8)
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
# Few shapes, so that what is compiled for one example serves the next.
SHAPES = [(), (0,), (1,), (37,), (5, 0), (3, 5), (2, 3, 4), (17, 16)]


def widened(scores):
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return np.abs(np.asarray(scores).astype(np.float64))


def ranking(scores):
    """Flat indices from the largest to the smallest, by a stable sort in float64."""
    flat = widened(scores).ravel()
    return np.lexsort(
        (np.arange(flat.size), -np.nan_to_num(flat, nan=0, posinf=np.inf), ~np.isnan(flat))
    )


def oracle(scores, keep):
    mask = np.zeros(np.size(scores), bool)
    mask[ranking(scores)[:keep]] = True
    return mask.reshape(np.shape(scores))


def random_scores(draw, shape, dtype):
    """Bit patterns of every kind, in mixtures from all distinct to all tied."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "few", "subnormal", "bits", "wide", "zeros"]))
    info = ml_dtypes.finfo(dtype)
    if kind == "normal":
        x = rng.standard_normal(shape)
    elif kind == "few":
        x = rng.integers(-2, 3, shape) * 0.5
    elif kind == "subnormal":
        x = rng.integers(-3, 4, shape) * float(info.smallest_subnormal)
    elif kind == "wide":
        x = np.exp(rng.uniform(-20, 20, shape)) * rng.integers(0, 2, shape)
    elif kind == "zeros":
        x = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    else:
        unsigned = f"u{dtype.itemsize}"
        words = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=np.uint64)
        return np.asarray(words).astype(unsigned).view(dtype)
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(dtype)


@LAWS
@given(st.data())
def test_keeps_what_a_stable_sort_keeps(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.sampled_from(SHAPES))
    x = random_scores(data.draw, shape, dtype)
    keep = data.draw(st.one_of(st.integers(0, x.size), st.sampled_from([0, x.size])))
    np.testing.assert_array_equal(largest_mask(x, keep), oracle(x, keep))


@pytest.mark.slow
@LAWS
@given(st.data())
def test_a_hint_changes_nothing_and_the_threshold_separates(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    x = random_scores(data.draw, (17, 16), dtype)
    keep = data.draw(st.integers(0, x.size))
    hint = random_scores(data.draw, (), dtype)
    mask, threshold = largest(x, keep, hint=hint)
    np.testing.assert_array_equal(mask, oracle(x, keep))
    magnitudes = widened(x)
    assert mask[magnitudes > float(threshold)].all()
    assert not mask[magnitudes < float(threshold)].any()
    np.testing.assert_array_equal(largest_mask(x, keep, hint=threshold), mask)


@pytest.mark.slow
@LAWS
@given(st.data())
def test_a_stack_is_its_elements(data):
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    stack, shape = data.draw(
        st.sampled_from([((4,), (3, 5)), ((2, 3), (7,)), ((3,), ()), ((0,), (4,))])
    )
    x = random_scores(data.draw, stack + shape, dtype)
    size = int(np.prod(shape))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    keep = rng.integers(0, size + 1, stack).astype(np.int32)
    mask = largest_mask(x, keep, stack_ndim=len(stack), hint=0.5)
    want = np.zeros(x.shape, bool)
    for i in np.ndindex(stack):
        want[i] = oracle(x[i], keep[i])
    np.testing.assert_array_equal(mask, want)
    batched = functools.reduce(lambda f, _: jax.vmap(f), stack, largest_mask)
    if x.size:
        np.testing.assert_array_equal(batched(x, keep), want)


@LAWS
@given(st.data())
def test_several_leaves_are_ranked_as_one(data):
    dtypes = data.draw(st.sampled_from([DTYPES[:1] * 3, DTYPES[:2] + DTYPES[:1], DTYPES[1:] * 2]))
    shapes = [(3, 5), (0,), (2, 3, 4)]
    leaves = [random_scores(data.draw, s, d) for s, d in zip(shapes, dtypes, strict=False)]
    flat = np.concatenate([widened(x).ravel() for x in leaves])
    keep = data.draw(st.integers(0, flat.size))
    masks, _ = largest_masks(leaves, keep)
    assert [m.shape for m in masks] == shapes
    got = np.concatenate([np.ravel(m) for m in masks])
    np.testing.assert_array_equal(got, oracle(flat, keep))


def test_stacks_are_ranked_apart_across_leaves():
    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal((3, *shape)).astype(np.float32) for shape in ((4,), (2, 5))]
    masks, thresholds = largest_masks(leaves, np.array([0, 5, 14]), stack_ndim=1, hint=1.0)
    for i, keep in enumerate((0, 5, 14)):
        alone, threshold = largest_masks([x[i] for x in leaves], keep)
        for got, want in zip(masks, alone, strict=True):
            np.testing.assert_array_equal(got[i], want)
        assert keep == 0 or thresholds[i] <= threshold
    with pytest.raises(ValueError, match="ranked together"):
        largest_masks([np.ones((2, 3)), np.ones((3, 3))], 1, stack_ndim=1)
    with pytest.raises(ValueError, match="ranked together"):
        largest_masks([], 0)


@LAWS
@given(st.data())
def test_orders_that_are_moved_stay(data):
    """`nonnegative` keeps order, up to the last bit; `among` puts what is not allowed last."""
    x = random_scores(data.draw, (37,), np.dtype(np.float32))
    x = np.where(np.isnan(np.asarray(x)), 0, np.asarray(x))
    # Comparisons on CPUs take subnormal numbers for 0: compared as bits.
    patterns = np.asarray(nonnegative(x)).view(np.int32).astype(np.int64)
    assert patterns.min() >= 0
    order = np.argsort(x.astype(np.float64), kind="stable")
    assert (np.diff(patterns[order]) >= 0).all()
    allowed = np.arange(37) % 3 > 0
    order = np.lexsort((np.arange(37), -widened(x), ~allowed))
    for keep in (5, int(allowed.sum())):
        want = np.isin(np.arange(37), order[:keep])
        np.testing.assert_array_equal(largest_mask(among(jnp.asarray(x), allowed), keep), want)


def test_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((50, 9))
        x[10:20] = 1 + np.arange(9) * 2.0**-52
        x[20:22] = 5e-324 * np.arange(9)
        for keep in (0, 1, 100, 200, 440, 450):
            for hint in (None, 1.0, np.nan):
                np.testing.assert_array_equal(largest_mask(x, keep, hint=hint), oracle(x, keep))


def test_traced_counts_compile_once_and_are_clipped():
    x = jnp.arange(10.0)
    mask = jax.jit(largest_mask)
    counts = [int(mask(x, jnp.int32(k)).sum()) for k in (-3, 0, 4, 10, 12)]
    assert counts == [0, 0, 4, 10, 10]
    assert mask._cache_size() == 1


def test_nan_and_infinity_are_kept_first():
    x = jnp.array([1.0, jnp.inf, jnp.nan, -jnp.nan, 2.0, -jnp.inf])
    kept = [np.flatnonzero(largest_mask(x, k)).tolist() for k in range(1, 6)]
    assert kept == [[2], [2, 3], [1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: largest_mask(jnp.ones(4), 5), ValueError, r"keep=5 of 4 entries.*0\.\.4"),
        (lambda: largest_mask(jnp.ones(4), -1), ValueError, "keep=-1"),
        (lambda: largest_mask(jnp.ones(4), 1, stack_ndim=2), ValueError, r"stack_ndim=2.*\(4,\)"),
        (lambda: largest_mask(jnp.arange(4), 1), TypeError, r"\(4,\).*int32"),
        (lambda: largest_mask(jnp.ones(4, jnp.float8_e4m3fn), 1), TypeError, "float8_e4m3fn"),
        (lambda: largest_masks([jnp.ones(4), jnp.arange(3)], 1), TypeError, "int32"),
        (lambda: largest_masks([jnp.ones(4)], 5), ValueError, "keep=5"),
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_too_many_entries_are_refused_before_any_compute():
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="2147483648 entries"):
        jax.eval_shape(lambda x: largest_mask(x, 1), huge)
    jax.eval_shape(lambda x: largest_mask(x, 1, stack_ndim=1), huge)


def collectives(compiled):
    """Bytes of each array that the compiled program communicates."""
    width = {"pred": 1, "s32": 4, "f32": 4}
    found = re.findall(
        r"= (.*?) (?:all-|collective-|reduce-scatter|ragged-)[\w-]*\(", compiled.as_text()
    )
    shapes = [s for result in found for s in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return [width[t] * int(np.prod([int(d) for d in dims.split(",") if d])) for t, dims in shapes]


AXES = list(itertools.product([AxisType.Auto, AxisType.Explicit], ["stack", "both", "last"]))
# The other pairs on demand.
ENOUGH = [(AxisType.Explicit, "both")]
SPECS = {"stack": ("a", "b"), "both": (None, "a", "b"), "last": (None, None, ("a", "b"))}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("kind", "split"),
    [pytest.param(*pair, marks=[] if pair in ENOUGH else pytest.mark.slow) for pair in AXES],
)
def test_a_sharded_tensor_is_never_gathered(split, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, PartitionSpec(*SPECS[split]))
    # Rounded, so that ties at the threshold are split across shards.
    x = np.round(np.random.default_rng(0).standard_normal((8, 64, 128)) * 20).astype(np.float32)
    sharded = jax.device_put(x, sharding)
    keep = jnp.int32(501)
    cases = [
        lambda x: largest_mask(x, keep),
        lambda x: largest(x, keep, hint=30.0).mask,
        lambda x: largest_mask(x, keep, stack_ndim=1),
        lambda x: largest_masks([x, x + 1], keep)[0][1],
        lambda x: n_m_mask(x, 2, 4, 1),
        lambda x: n_m_mask(x, 2, 4, 2),
    ]
    for case in cases:
        compiled = jax.jit(case).lower(sharded).compile()
        mask = compiled(sharded)
        np.testing.assert_array_equal(mask, case(x))
        assert mask.sharding.is_equivalent_to(sharding, x.ndim)
        # Counts only: at most one int32 for each of 8 stack elements and 8 devices.
        assert max(collectives(compiled), default=0) <= 256
        shard = x.nbytes // 8
        assert compiled.memory_analysis().temp_size_in_bytes <= 1.2 * shard + 16_384


@pytest.mark.parametrize("stack_ndim", [0, 1])
def test_temporaries_are_a_fraction_of_the_leaf(stack_ndim):
    x = jax.ShapeDtypeStruct((4, 500, 500), jnp.float32)
    mask = jax.jit(lambda x, k: largest_mask(x, k, stack_ndim=stack_ndim))
    compiled = mask.lower(x, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * 4 * x.size
