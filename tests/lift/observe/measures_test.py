"""What measures measure, against NumPy, for every way in which a parameter meets activations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.lift import Statistics, statistics_for
from jaxopt_compress.tree import Layout
from tests.models.case import normal

CLOSE = {"rtol": 1e-5, "atol": 1e-4}
ms = jc.measures


def cubes(x, inside):
    x = x if inside is None else jnp.where(inside[..., None], x, -jnp.inf)
    total = jnp.where(jnp.isinf(x), 0, x**3).sum(-2)
    return ms.Reducible(sums={"total": total}, highs={"top": x.max(-2, initial=-jnp.inf)})


def cubes_of(values, rows):
    return values["total"] / jnp.maximum(rows, 1)[..., None]


CUBES = ms.Measure("cubes", observe=cubes, result=cubes_of)
ALL = (ms.moments(), ms.ranges(), ms.means(), ms.zeros(), CUBES)


def check(stats, rows):
    """All measures against the rows themselves, ``[n, k]``."""
    rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
    assert stats.rows == len(rows)
    np.testing.assert_allclose(stats.second_moment, rows.T @ rows / len(rows), **CLOSE)
    np.testing.assert_allclose(stats.mean, rows.mean(0), **CLOSE)
    np.testing.assert_allclose(stats.mean_magnitude, np.abs(rows).mean(0), **CLOSE)
    np.testing.assert_allclose(stats.low, rows.min(0), **CLOSE)
    np.testing.assert_allclose(stats.high, rows.max(0), **CLOSE)
    np.testing.assert_allclose(stats.absmax, np.abs(rows).max(0), **CLOSE)
    np.testing.assert_allclose(stats.zero_fraction, (rows == 0).mean(0), **CLOSE)
    np.testing.assert_allclose(stats.value("cubes"), (rows**3).mean(0), rtol=1e-4, atol=1e-3)


def layer(stats, *index):
    return jax.tree.map(lambda x: x[index], stats)


def relu(seed, *shape):
    """Activations of which half are zeros, with a scale of its own for each column."""
    return jnp.maximum(normal(seed, *shape), 0) * jnp.logspace(-1, 1, shape[-1])


def chain(params, x):
    """The inputs of three layers whose scales differ by 10 each."""
    seen = []
    for w in params:
        seen.append(x)
        x = jnp.maximum(x @ w, 0)
    return seen


LAYERS = normal(0, 3, 4, 4) * jnp.array([0.3, 10, 0.02])[:, None, None]


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.maximum(x @ w, 0), None), x, params["w"])[0]


def scanned_turned(params, x):
    return lax.scan(lambda x, w: (jnp.maximum(x @ w.T, 0), None), x, params["w"])[0]


def unrolled(params, x):
    for i in range(3):
        x = jnp.maximum(x @ params["w"][i], 0)
    return x


@pytest.mark.parametrize("fn", [scanned, scanned_turned, unrolled])
def test_layers_have_statistics_of_their_own(fn):
    params = {"w": LAYERS.transpose(0, 2, 1) if fn is scanned_turned else LAYERS}
    batches = [relu(1, 7, 4), relu(2, 5, 4)]
    (stats,) = jc.calibrate(fn, params, batches, measures=ALL)["w"]
    assert stats.rows.shape == (3,)
    seen = [jnp.concatenate(x) for x in zip(*(chain(LAYERS, x) for x in batches), strict=True)]
    for i, rows in enumerate(seen):
        check(layer(stats, i), rows)


def test_layers_that_are_not_used_have_met_nothing():
    (stats,) = jc.calibrate(
        lambda p, x: x @ p["w"][2] + x @ p["w"][0], {"w": LAYERS}, [relu(1, 7, 4)], measures=ALL
    )["w"]
    np.testing.assert_array_equal(stats.rows, [7, 0, 7])
    nothing = layer(stats, 1)
    for name in ("mean", "mean_magnitude", "low", "high", "absmax", "zero_fraction"):
        np.testing.assert_array_equal(getattr(nothing, name), np.zeros(4))
    np.testing.assert_array_equal(nothing.second_moment, np.zeros((4, 4)))


def test_a_stack_that_is_scanned_and_indexed_is_one_way():
    x = relu(1, 7, 4)
    fn = lambda p, x: scanned(p, x) + x @ p["w"][1]
    (stats,) = jc.calibrate(fn, {"w": LAYERS}, [x], measures=ALL)["w"]
    seen = chain(LAYERS, x)
    check(layer(stats, 0), seen[0])
    check(layer(stats, 1), jnp.concatenate([seen[1], x]))


def test_scanned_experts_have_statistics_per_layer_and_expert():
    params, x = (
        {"w": normal(0, 2, 3, 4, 4)},
        relu(1, 3, 5, 4) * jnp.array([1, 10, 100])[:, None, None],
    )

    def fn(params, x):
        block = lambda x, w: (jnp.maximum(jnp.einsum("erk,ekn->ern", x, w), 0), None)
        return lax.scan(block, x, params["w"])[0]

    (stats,) = jc.calibrate(fn, params, [x], measures=ALL)["w"]
    second = jnp.maximum(jnp.einsum("erk,ekn->ern", x, params["w"][0]), 0)
    for i in range(3):
        check(layer(stats, 0, i), x[i])
        np.testing.assert_allclose(layer(stats, 1, i).mean, second[i].mean(0), **CLOSE)


@pytest.mark.parametrize("turned", [False, True])
def test_vmapped_experts_have_statistics_each(turned):
    params, x = {"w": normal(0, 3, 4, 4)}, relu(1, 3, 5, 4) * jnp.array([1, 10, 100])[:, None, None]
    product = (lambda w, x: x @ w.T) if turned else (lambda w, x: x @ w)
    fn = lambda p, x: jax.vmap(product)(p["w"], x)
    (stats,) = jc.calibrate(fn, params, [x], measures=ALL)["w"]
    assert stats.contracting == ((-1,) if turned else (-2,))
    for i in range(3):
        check(layer(stats, i), x[i])


def test_ragged_experts_have_statistics_of_their_rows_and_zeros_without_any():
    params, x, sizes = {"w": normal(0, 3, 4, 5)}, relu(1, 9, 4), jnp.array([2, 0, 6])
    fn = lambda p, x, n: lax.ragged_dot(x, p["w"], n)
    (stats,) = jc.calibrate(fn, params, [(x, sizes)], measures=ALL)["w"]
    check(layer(stats, 0), x[:2])
    check(layer(stats, 2), x[2:8])
    np.testing.assert_array_equal(stats.rows, [2, 0, 6])
    nothing = layer(stats, 1)
    for name in ("mean", "mean_magnitude", "low", "absmax", "zero_fraction"):
        np.testing.assert_array_equal(getattr(nothing, name), np.zeros(4))


def test_convolutions_measure_patches():
    params, x = {"w": normal(0, 3, 2, 5)}, relu(1, 2, 7, 2)
    numbers = ("NWC", "WIO", "NWC")
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=numbers)
    (stats,) = jc.calibrate(fn, params, [x], measures=ALL)["w"]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x), 3, axis=1)
    check(stats, windows.transpose(0, 1, 3, 2).reshape(-1, 6))


def test_devices_of_a_shard_map_add_up():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}

    def fn(params, x):
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, **specs)(params["w"], x)

    x = relu(1, 32, 4) * jnp.repeat(jnp.logspace(-1, 1, 8), 4)[:, None]
    (stats,) = jc.calibrate(fn, {"w": normal(0, 4, 5)}, [x, 2 * x], measures=ALL)["w"]
    check(stats, jnp.concatenate([x, 2 * x]))


def loss(params, x, y):
    return jnp.mean((jnp.tanh(params["table"][x] @ params["w"]) - y) ** 2)


def test_fisher_is_the_mean_of_squared_gradients():
    params = {"table": normal(0, 9, 4), "w": normal(1, 4, 3), "b": normal(2, 3)}
    batches = [(jnp.array([i, i + 3]), normal(i, 2, 3)) for i in range(4)]
    stats = jc.calibrate(loss, params, batches, measures=(ms.fisher(), ms.means()))
    grads = [jax.grad(loss)(params, *batch) for batch in batches]
    for path in ("w", "table"):
        want = np.mean([np.square(g[path]) for g in grads], 0)
        np.testing.assert_allclose(stats[path][0].fisher, want, rtol=1e-5)
    assert set(stats) == {"w", "table"}
    assert [s.contracting for s in stats["table"]] == [()]
    assert stats["table"][0].rows == 0 and not stats["table"][0].has("means")
    np.testing.assert_allclose(
        stats["w"][0].mean, np.mean([params["table"][x] for x, _ in batches], (0, 1)), **CLOSE
    )


def test_fisher_of_layers_can_be_sliced():
    params, x = {"w": LAYERS}, relu(1, 7, 4)
    fn = lambda p, x: jnp.sum(scanned(p, x))
    (stats,) = jc.calibrate(fn, params, [x, x / 2], measures=(ms.fisher(),))["w"]
    want = np.mean([np.square(jax.grad(fn)(params, y)["w"]) for y in (x, x / 2)], 0)
    np.testing.assert_allclose(stats.fisher, want, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(layer(stats, 1).fisher, want[1], rtol=1e-4, atol=1e-9)


def test_fisher_asks_for_a_scalar():
    with pytest.raises(ValueError, match=r"'fisher'.*scalar.*\(7, 4\)"):
        jc.calibrate(scanned, {"w": LAYERS}, [relu(1, 7, 4)], measures=(ms.fisher(),))


STATS = jc.calibrate(scanned, {"w": LAYERS}, [relu(1, 7, 4)], measures=())["w"][0]


@pytest.mark.parametrize(
    "name, measure",
    [
        ("mean", "means"),
        ("mean_magnitude", "means"),
        ("low", "ranges"),
        ("high", "ranges"),
        ("absmax", "ranges"),
        ("second_moment", "moments"),
        ("zero_fraction", "zeros"),
        ("fisher", "fisher"),
    ],
)
def test_what_was_not_measured_names_its_measure(name, measure):
    assert not STATS.has(measure) and STATS.values == {}
    with pytest.raises(ValueError, match=rf"measures=\(jc.measures.{measure}\(\), ...\)"):
        getattr(STATS, name)


def test_only_what_is_asked_for_is_summed():
    (stats,) = jc.calibrate(scanned, {"w": LAYERS}, [relu(1, 7, 4)], measures=(ms.zeros(),))["w"]
    assert stats.has("zeros") and not stats.has("moments")
    assert {x.shape for x in jax.tree.leaves(stats)} == {(3,), (3, 4)}


def test_a_measure_without_a_result_returns_its_sums():
    plain = CUBES._replace(result=None)
    (stats,) = jc.calibrate(scanned, {"w": LAYERS}, [relu(1, 7, 4)], measures=(plain,))["w"]
    assert {k: v.shape for k, v in stats.value("cubes").items()} == {"total": (3, 4), "top": (3, 4)}


@pytest.mark.parametrize(
    "measures, error, match",
    [
        ((ms.means(), ms.means()), ValueError, "two measures have the name 'means'"),
        (("means",), TypeError, "measures='means'"),
        ((ms.Measure("nothing"),), ValueError, "'nothing' needs either observe or of_gradient"),
    ],
)
def test_bad_measures_are_named(measures, error, match):
    with pytest.raises(error, match=match):
        jc.calibrate(scanned, {"w": LAYERS}, [relu(1, 7, 4)], measures=measures)


def test_statistics_pass_through_jit_without_compiling_again():
    first, second = (
        jc.calibrate(scanned, {"w": LAYERS}, [relu(i, 7, 4)])["w"][0] for i in range(2)
    )
    traces = []

    @jax.jit
    def mean(stats):
        traces.append(stats)
        return stats.mean, stats

    got, back = mean(first)
    mean(second)
    assert len(traces) == 1
    assert jax.tree.structure(back) == jax.tree.structure(second)
    np.testing.assert_allclose(got, first.mean, rtol=1e-6)
    both = dataclasses.replace(first, held_out=second)
    assert len(jax.tree.leaves(both)) == 2 * len(jax.tree.leaves(first))
    assert first.held_out is None


def test_the_entry_for_a_layout():
    entry = functools.partial(Statistics, values={})
    one, two, stack = entry(1, contracting=(-2,)), entry(2, contracting=(-1,)), jnp.ones(3)
    three = entry(stack, contracting=(-1,))
    stats = {"w": [one, two, three], "table": [entry(0, contracting=())]}
    assert statistics_for(stats, "w", Layout((-1,), (-2,))) is two
    assert statistics_for(stats, "w", Layout((-2,), (-1,))) is one
    assert statistics_for(stats, "w", Layout((-1,), (-2,), (-3,))) is three
    assert statistics_for(stats, "w", Layout((-3,), (-1,))) is None
    assert statistics_for(stats, "table", Layout((-1,), (-2,))) is stats["table"][0]
    assert statistics_for(stats, "other", Layout((-1,), (-2,))) is None
    assert statistics_for(None, "w", Layout((-1,), (-2,))) is None
