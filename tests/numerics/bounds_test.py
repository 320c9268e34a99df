"""Ranges against plain numpy and scipy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxopt_compress.numerics import bounds
from jaxopt_compress.numerics.codes import decode, round_to_grid
from jaxopt_compress.numerics.formats import FORMATS, format_of
from jaxopt_compress.numerics.ranges import absmean
from jaxopt_compress.numerics.steps import step_of

AXES = (1, 2)
SHAPE = (4, 6, 64)


def rows(kind="heavy"):
    """Four rows along `AXES`: of long tails, all zeros, on a grid, and very small or large."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, SHAPE)
    x[1] = 0
    x[2] = rng.integers(-8, 8, SHAPE[1:]) + (0 if kind == "heavy" else 3)
    x[2, 0, :2] = -8, 7
    x[3] = x[3] * 1e-30
    return x.astype(np.float32)


@functools.cache
def measured(chosen, name="int4", symmetric=True, seed=0):
    """``low, high`` of the rows, compiled; and that is what is measured without compiling."""
    fmt = format_of(name)
    x = jnp.asarray(rows())

    def view(x, low, high):
        scale, zero = step_of(low, high, fmt, symmetric)
        level, _ = round_to_grid(x, scale, zero, fmt)
        return decode(level if zero is None else level - zero, scale, x.dtype)

    def run(x):
        return chosen.measure(x, AXES, fmt, symmetric, lambda *range_: view(x, *range_))

    low, high = jax.jit(run)(x)
    assert low.shape == high.shape == (4, 1, 1)
    assert low.dtype == high.dtype == jnp.float32
    return np.asarray(low).reshape(4), np.asarray(high).reshape(4)


def flat():
    return rows().reshape(4, -1)


def test_absmax():
    low, high = measured(bounds.absmax())
    np.testing.assert_array_equal(high, np.abs(flat()).max(1))
    np.testing.assert_array_equal(low, -high)
    low, high = measured(bounds.absmax(), symmetric=False)
    np.testing.assert_array_equal((low, high), (flat().min(1), flat().max(1)))


def test_absmean():
    low, high = measured(bounds.Bounds(absmean), "binary")
    np.testing.assert_allclose(high, np.abs(flat().astype(float)).mean(1), rtol=1e-6)
    np.testing.assert_array_equal(low, -high)


@pytest.mark.parametrize("percent", [50.5, 99.9, 100])
def test_percentile(percent):
    # Of a float32 share, as there is none in float64 here.
    part = float(np.float32(percent / 100))
    low, high = measured(bounds.percentile(percent))
    x = flat().astype(float)
    want = np.quantile(np.abs(x), part, 1)
    np.testing.assert_allclose(high, want, rtol=1e-5)
    np.testing.assert_array_equal(low, -high)
    low, high = measured(bounds.percentile(percent), symmetric=False)
    size = np.abs(x).max(1)
    other = float(np.float32(1) - np.float32(part))
    assert (np.abs(low - np.quantile(x, other, 1)) <= 1e-5 * size).all()
    assert (np.abs(high - np.quantile(x, part, 1)) <= 1e-5 * size).all()


def squared_errors(x, fmt, symmetric, parts):
    """The squared error of each part of the range, for each row, in float64."""
    grid = fmt.grid
    low = x.min(1, keepdims=True) if symmetric is False else -np.abs(x).max(1, keepdims=True)
    high = x.max(1, keepdims=True) if symmetric is False else -low
    out = []
    for part in parts:
        if symmetric:
            scale, zero = high * part / fmt.top, 0
        else:
            ends = np.minimum(low * part, 0), np.maximum(high * part, 0)
            scale = (ends[1] - ends[0]) / (grid.high - grid.low)
            zero = np.round(grid.low - ends[0] / np.where(scale == 0, 1, scale))
        scale = np.where(scale == 0, 1, scale)
        code = np.clip(np.round(x / scale) + zero, grid.low, grid.high)
        out.append((((code - zero) * scale - x) ** 2).sum(1))
    return np.array(out)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse(symmetric):
    candidates, least = 20, 0.3
    low, high = measured(bounds.mse(candidates, least), symmetric=symmetric)
    x = flat().astype(float)
    parts = np.linspace(1, least, candidates)
    errors = squared_errors(x, FORMATS["int4"], symmetric, parts)
    top = np.abs(x).max(1) if symmetric else x.max(1)
    for row in (0, 2):
        chosen = np.argmin(np.abs(parts - high[row] / top[row]))
        np.testing.assert_allclose(high[row], parts[chosen] * top[row], rtol=1e-6)
        bottom = -top[row] if symmetric else x[row].min()
        np.testing.assert_allclose(low[row], parts[chosen] * bottom, rtol=1e-6)
        assert errors[chosen, row] <= errors[:, row].min() * (1 + 1e-5) + 1e-12
    # Long tails are cut; nothing is where the grid has every value, or where all are equal.
    assert high[0] < top[0]
    assert (low[1], high[1]) == (0, 0)
    if not symmetric:
        assert high[2] == top[2]


@pytest.mark.parametrize(("name", "top"), [("int2", 1), ("int4", 7), ("int8", 127), ("nf4", 1)])
def test_the_largest_magnitude_is_a_level(name, top):
    fmt = format_of(name)
    low, high = measured(bounds.absmax(on_grid=True), name)
    scale, _ = step_of(jnp.asarray(low), jnp.asarray(high), fmt, True)
    most = np.abs(flat()).max(1)[[0, 2, 3]]
    np.testing.assert_allclose(np.asarray(scale)[[0, 2, 3]] * top, most, rtol=1e-6)
    np.testing.assert_array_equal(low, -high)
    whole = measured(bounds.absmax(on_grid=True), "int4", symmetric=False)
    np.testing.assert_array_equal(whole, measured(bounds.absmax(), "int4", symmetric=False))


@pytest.mark.parametrize("name", ["int2", "int4"])
def test_wider_ranges_are_tried_where_they_are_asked_for(name):
    """Rows for which a wider one is better exist, and none gets worse."""
    fmt = FORMATS[name]
    x = np.random.default_rng(1).uniform(-1, 1, (4, 6, 64)).astype(np.float32)
    x[0] = np.sign(x[0])  # one magnitude, which is a level of the widest range alone

    def view(low, high):
        scale, _ = step_of(low, high, fmt, True)
        return decode(round_to_grid(jnp.asarray(x), scale, None, fmt)[0], scale, jnp.float32)

    run = lambda b: np.asarray(b.measure(jnp.asarray(x), AXES, fmt, True, view)[1]).ravel()
    plain, wider = run(bounds.mse()), run(bounds.mse(on_grid=True))
    rows = x.reshape(4, -1).astype(float)
    error = lambda row, high: squared_errors(row[None], fmt, True, [high / abs(row).max()])[0, 0]
    errors = np.array([list(map(error, rows, high)) for high in (plain, wider)])
    assert np.all(errors[1] <= errors[0] * (1 + 1e-5))
    np.testing.assert_allclose(wider[0], fmt.top / fmt.grid.high, rtol=1e-6)
    assert errors[1, 0] < 1e-6 * errors[0, 0]


def test_one_bit_has_no_level_above_zero():
    with pytest.raises(ValueError, match="'int1' has none above 0"):
        bounds.absmax(on_grid=True).check(format_of("int1"), True)


def test_mse_is_scale_free_as_far_as_squares_are():
    """Squares of values below 1e-19 are zeros: then the whole range stays."""
    _, high = measured(bounds.mse(20, 0.3))
    assert high[3] == np.abs(flat()[3]).max()


def test_mse_of_floats():
    low, high = measured(bounds.mse(20, 0.3), "float4_e2m1fn")
    x = flat().astype(float)
    top = np.abs(x).max(1)
    at = np.unique(np.asarray(FORMATS["float4_e2m1fn"].grid.decode(jnp.arange(16))))
    errors = []
    parts = np.linspace(1, 0.3, 20)
    for part in parts:
        scale = part * top[0] / 6
        errors.append((np.abs(x[0][:, None] / scale - at).min(1) ** 2).sum() * scale**2)
    chosen = np.argmin(np.abs(parts - high[0] / top[0]))
    assert errors[chosen] <= min(errors) * (1 + 1e-5)
    np.testing.assert_array_equal(low, -high)


def divergence(count, kept, levels):
    """The divergence of the merged histogram from that cut at ``kept``, by its definition."""
    p = count[:kept].astype(float)
    p[-1] += count[kept:].sum()
    q = np.zeros(kept)
    merged = np.arange(kept) * levels // kept
    for level in range(levels):
        here = (merged == level) & (count[:kept] > 0)
        if here.any():
            q[here] = count[:kept][merged == level].sum() / here.sum()
    q /= max(q.sum(), 1)
    # What has no counterpart counts as if that were one in ten millions.
    return scipy.special.rel_entr(p / max(p.sum(), 1), np.maximum(q, 1e-7)).sum()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_entropy(name):
    bins, levels = 512, FORMATS[name].grid.high + 1
    low, high = measured(bounds.entropy(bins), name)
    np.testing.assert_array_equal(low, -high)
    for row in (0, 2, 3):
        x = np.abs(flat()[row]).astype(float)
        count, edges = np.histogram(x, bins, (0, x.max()))
        kept = round(high[row] / edges[1])
        np.testing.assert_allclose(high[row], kept * edges[1], rtol=1e-5)
        # Every third threshold is looked at, the first of them with a bin for each level.
        tried = range(levels, bins + 1, max(1, (bins - levels) // 128))
        least = min(divergence(count, k, levels) for k in tried)
        assert divergence(count, kept, levels) <= least * 1.001 + 1e-4
    assert high[1] == 0


def test_ranges_stay_finite():
    """Largest and smallest floats, zeros, a single value: no NaN, no infinity."""
    top, tiny = np.finfo(np.float32).max, np.float32(2.0**-149)
    x = np.zeros((4, 32), np.float32)
    x[0], x[1, ::2], x[2, 3] = top, tiny, -top
    x[3] = top * np.linspace(-1, 1, 32, dtype=np.float32)
    for chosen in (
        bounds.absmax(),
        bounds.absmax(on_grid=True),
        bounds.mse(8, on_grid=True),
        bounds.Bounds(absmean),
        bounds.percentile(99),
        bounds.mse(8),
        bounds.entropy(64),
    ):
        fmt = format_of("int4")

        def view(low, high, fmt=fmt):
            scale, _ = step_of(low, high, fmt, True)
            return decode(round_to_grid(jnp.asarray(x), scale, None, fmt)[0], scale, jnp.float32)

        low, high = chosen.measure(jnp.asarray(x), (1,), fmt, True, view)
        assert np.isfinite(low).all() and np.isfinite(high).all(), chosen
        assert (np.asarray(high) >= 0).all()


def test_moving_average_keeps_how_the_range_is_measured():
    assert bounds.moving_average(0.75).decay == 0.75
    whole, cut = bounds.moving_average(0.5), bounds.moving_average(0.5, bounds.percentile(90))
    np.testing.assert_array_equal(measured(whole), measured(bounds.absmax()))
    np.testing.assert_array_equal(measured(cut), measured(bounds.percentile(90)))
    assert bounds.absmax().decay is None


def refused(made, name, symmetric=True):
    made.check(FORMATS[name], symmetric)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bounds.percentile(50), r"percentile\(50\): it lies above 50 and is at most 100"),
        (lambda: bounds.percentile(100.5), r"percentile\(100.5\)"),
        (lambda: bounds.mse(0), r"mse\(0, 0.2\): at least one candidate, in \(0, 1\]"),
        (lambda: bounds.mse(8, 0.0), r"mse\(8, 0.0\)"),
        (lambda: bounds.moving_average(1.0), r"decay=1.0\): it is at least 0 and below 1"),
        (lambda: bounds.moving_average(-0.1), r"decay=-0.1"),
        (lambda: refused(bounds.entropy(), "nf4"), "signed integers, not 'nf4'"),
        (lambda: refused(bounds.entropy(), "int4", False), "not 'int4' with symmetric=False"),
        (lambda: refused(bounds.entropy(100), "int8"), r"entropy\(100\) needs .* than 'int8'"),
        (
            lambda: refused(bounds.moving_average(of=bounds.entropy()), "nf4"),
            "signed integers, not 'nf4'",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
