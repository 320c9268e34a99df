"""Statistics of activations, against direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.models import CASES
from tests.models.case import normal

# float32 sums of a few hundred products, taken in two orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def check(stats, rows):
    """All statistics against the rows themselves, ``[n, k]``."""
    rows = np.asarray(rows, np.float64)
    assert stats.rows == len(rows)
    np.testing.assert_allclose(stats.mean, rows.mean(0), **CLOSE)
    np.testing.assert_allclose(stats.mean_magnitude, np.abs(rows).mean(0), **CLOSE)
    np.testing.assert_allclose(stats.low, rows.min(0), **CLOSE)
    np.testing.assert_allclose(stats.high, rows.max(0), **CLOSE)
    np.testing.assert_allclose(stats.absmax, np.abs(rows).max(0), **CLOSE)
    np.testing.assert_allclose(stats.second_moment, rows.T @ rows / len(rows), **CLOSE)


@pytest.mark.fast(
    "linen_attention",
    "linen_gru",
    "linen_scanned_transformer",
    "nnx_conv_net",
    "equinox_conv_attention",
    "haiku_lstm",
    "einsum_experts",
    "concatenate_inputs",
    "conv_grouped",
    "ragged_dot",
    "scan_nested",
    "while_loop",
    "switch",
    "vmap_models",
    "custom_vjp_of_weight",
    "shard_map_data_parallel",
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_contracted_parameter_of_the_zoo_has_statistics(case):
    fn, params, args = case.make()
    stats = jc.calibrate(fn, params, [args], measures=(jc.measures.ranges(), jc.measures.means()))
    contracted = {path for path, uses in case.uses.items() if any(u.contracting for u in uses)}
    assert set(stats) == contracted
    for path, entries in stats.items():
        assert {s.contracting for s in entries} == {
            u.contracting for u in case.uses[path] if u.contracting
        }
        assert all(np.isfinite(field).all() for field in jax.tree.leaves(entries))


def test_dense_over_a_ragged_last_batch_compiles_once_per_shape():
    traces = []

    def model(params, x):
        traces.append(x.shape)
        return jnp.tanh(x @ params["first"]) @ params["second"]

    params = {"first": normal(0, 8, 5), "second": normal(1, 5, 3)}
    batches = [normal(2, 16, 8), normal(3, 16, 8), normal(4, 7, 8)]
    stats = jc.calibrate(model, params, batches)
    x = jnp.concatenate(batches)
    check(stats["first"][0], x)
    check(stats["second"][0], jnp.tanh(x @ params["first"]))
    assert traces == [(16, 8), (7, 8)]


def test_contracted_axes_come_in_the_order_of_the_parameter():
    params = {"out": normal(0, 3, 4, 6)}
    x = normal(1, 5, 4, 3)  # heads and head size the other way round
    stats = jc.calibrate(lambda p, x: jnp.einsum("bdh,hde->be", x, p["out"]), params, [x])
    check(stats["out"][0], x.transpose(0, 2, 1).reshape(5, 12))


def test_convolution_statistics_are_those_of_its_patches():
    params, x = {"w": normal(0, 3, 3, 2, 5)}, normal(1, 2, 6, 6, 2)
    numbers = ("NHWC", "HWIO", "NHWC")

    def model(params, x):
        return lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", dimension_numbers=numbers)

    stats = jc.calibrate(model, params, [x])["w"][0]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x), (3, 3), axis=(1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 18)
    check(stats, patches)


def test_depthwise_convolution_has_statistics_per_channel():
    params, x = {"w": normal(0, 3, 1, 4)}, normal(1, 2, 7, 4)

    def model(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=4,
        )

    stats = jc.calibrate(model, params, [x])["w"][0]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x), 3, axis=1)
    for channel in range(4):
        part = jax.tree.map(lambda field, c=channel: field[c], stats)
        check(part, windows[:, :, channel].reshape(-1, 3))


def test_scanned_layers_have_one_set_each_and_reused_weights_one_in_all():
    params = {"layers": normal(0, 3, 4, 4), "cell": normal(1, 4, 4)}

    def model(params, x):
        def body(x, w):
            return jnp.tanh(x @ w) @ params["cell"], None

        return lax.scan(jax.checkpoint(body), x, params["layers"])[0]

    x = normal(2, 6, 4)
    stats = jc.calibrate(model, params, [x])
    seen = []
    for layer in range(3):
        check(jax.tree.map(lambda field, i=layer: field[i], stats["layers"][0]), x)
        seen.append(jnp.tanh(x @ params["layers"][layer]))
        x = seen[-1] @ params["cell"]
    check(stats["cell"][0], jnp.concatenate(seen))


def test_while_loops_and_branches_count_what_ran():
    params = {"loop": normal(0, 4, 4), "left": normal(1, 4, 4), "right": normal(2, 4, 4)}

    def model(params, x, steps):
        x = lax.while_loop(
            lambda c: c[0] < steps, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["loop"])), (0, x)
        )[1]
        return lax.cond(steps > 2, lambda x: x @ params["left"], lambda x: x @ params["right"], x)

    x = normal(3, 5, 4)
    stats = jc.calibrate(model, params, [(x, jnp.int32(3)), (x, jnp.int32(1))])
    hidden = [x]
    for _ in range(3):
        hidden.append(jnp.tanh(hidden[-1] @ params["loop"]))
    check(stats["loop"][0], jnp.concatenate([*hidden[:3], x]))
    check(stats["left"][0], hidden[3])
    check(stats["right"][0], hidden[1])


def test_concatenated_weights_see_their_own_part():
    params = {"a": normal(0, 3, 4), "b": normal(1, 5, 4)}
    x = normal(2, 6, 8)
    stats = jc.calibrate(lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=0), params, [x])
    check(stats["a"][0], x[:, :3])
    check(stats["b"][0], x[:, 3:])


def test_ragged_products_count_the_rows_of_each_group():
    params, x, sizes = {"w": normal(0, 3, 4, 5)}, normal(1, 9, 4), jnp.array([2, 0, 6], jnp.int32)
    stats = jc.calibrate(lambda p, x, n: lax.ragged_dot(x, p["w"], n), params, [(x, sizes)])["w"][0]
    np.testing.assert_array_equal(stats.rows, [2, 0, 6])
    check(jax.tree.map(lambda field: field[0], stats), x[:2])
    check(jax.tree.map(lambda field: field[2], stats), x[2:8])


def test_a_parameter_contracted_in_two_ways_has_both_in_program_order():
    params, x = {"w": normal(0, 4, 6)}, normal(1, 5, 4)
    hidden = jnp.tanh(x @ params["w"])
    forward = jc.calibrate(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, params, [x])["w"]
    backward = jc.calibrate(lambda p, x: jnp.tanh(x @ p["w"].T) @ p["w"], params, [hidden])["w"]
    assert [s.contracting for s in forward] == [(-2,), (-1,)]
    assert [s.contracting for s in backward] == [(-1,), (-2,)]
    check(forward[0], x)
    check(forward[1], hidden)
    check(backward[0], hidden)


def test_sharded_batches_sum_over_all_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"w": normal(0, 8, 5)}, normal(1, 32, 8)
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))

    def inside(params, x):
        block = lambda w, x: x @ w
        return jax.shard_map(block, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(
            params["w"], x
        )

    check(jc.calibrate(lambda p, x: x @ p["w"], params, [placed])["w"][0], x)
    check(jc.calibrate(inside, params, [placed])["w"][0], x)


def test_a_contraction_split_inside_shard_map_is_refused_by_name():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def model(params, x):
        block = lambda w, x: lax.psum(x @ w, "model")
        specs = (P("model"), P(None, "model"))
        return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P())(params["w"], x)

    with pytest.raises(ValueError, match=r"'w' of shape \(16, 5\).*split over devices"):
        jc.calibrate(model, {"w": normal(0, 16, 5)}, [normal(1, 4, 16)])


def test_no_batches_are_named_and_empty_ones_skipped():
    params, model = {"w": normal(0, 4, 4)}, lambda p, x: x @ p["w"]
    for batches in ([], [jnp.zeros((0, 4))]):
        with pytest.raises(ValueError, match="at least one batch that is not empty"):
            jc.calibrate(model, params, batches)
    x = normal(1, 2, 4)
    check(jc.calibrate(model, params, [jnp.zeros((0, 4)), x, jnp.zeros((0, 4))])["w"][0], x)


def test_where_chooses_and_names_what_it_does_not_find():
    params, x = {"a": normal(0, 4, 4), "b": normal(1, 4, 4)}, normal(2, 3, 4)
    model = lambda p, x: x @ p["a"] @ p["b"]
    stats = jc.calibrate(model, params, [x], where="b")
    assert list(stats) == ["b"]
    check(stats["b"][0], x @ params["a"])
    with pytest.raises(ValueError, match=r"'c'.*nearest paths are"):
        jc.calibrate(model, params, [x], where="c")


@pytest.mark.parametrize("how", ["scan", "batch", "concatenated batch"])
def test_weights_that_are_joined_to_a_stack(how):
    """Each one keeps the statistics of its own part."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal((4, 4)), jnp.float32) for k in ("a", "b")}
    x = jnp.asarray(rng.standard_normal((2, 6, 4)) * [[[1.0]], [[100.0]]], jnp.float32)

    def fn(p, x):
        if how == "concatenated batch":
            w = jnp.concatenate([p["a"][None], p["b"][None]])
        else:
            w = jnp.stack([p["a"], p["b"]])
        if how == "scan":
            return jax.lax.scan(lambda c, wx: (c, wx[1] @ wx[0]), 0.0, (w, x))[1]
        return jnp.einsum("end,edf->enf", x, w)

    stats = jc.calibrate(fn, params, [x])
    assert all(use for use in jc.uses(fn, params, x).values())
    for i, name in enumerate(("a", "b")):
        got = stats[name][0].second_moment.reshape(4, 4)
        np.testing.assert_allclose(got, x[i].T @ x[i] / 6, rtol=1e-5, atol=1e-5 * 100**i)
