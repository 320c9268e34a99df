"""What looks at whole functions, on parameters and batches that are split over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def net(params, x):
    """Stacked layers in a scan, and one behind them."""
    layer = lambda x, own: (jnp.tanh(x @ own["w"] + own["b"]), None)
    return jax.lax.scan(layer, x, params["layers"])[0] @ params["out"] + params["bias"]


SIZES = jnp.array([0.3, 2.0])[:, None, None]  # of layers
PARAMS = {
    "layers": {"w": normal(0, 2, 16, 16) * SIZES, "b": normal(1, 2, 16)},
    "out": normal(2, 16, 8),
    "bias": normal(3, 8),
}
SPECS = {
    "layers": {"w": P(None, "model", "data"), "b": P(None, "model")},
    "out": P("data", "model"),
    "bias": P("model"),
}
WEIGHTS = ["layers/w", "out"]
X = [1 + normal(10 + i, 64, 16) @ normal(9, 16, 16) / 4 for i in range(2)]


def split():
    """The parameters and the batches on a mesh."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(put, PARAMS, SPECS), [put(x, P("data")) for x in X]


def assert_alike(got, want):
    """The same codes, and the same floats but for the order of sums."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if np.issubdtype(b.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)


IN_ORDER = {
    "gptq": lambda: jc.gptq("int3", 8, WEIGHTS, symmetric=False),
    "auto_round": lambda: jc.auto_round("int3", where=WEIGHTS, method="relaxed", steps=50),
    "awq": lambda: jc.awq("int3", where=WEIGHTS),
    "smooth_quant": lambda: jc.smooth_quant(where=WEIGHTS),
    "sparse_gpt, gptq": lambda: jc.chain(
        jc.sparse_gpt(0.5, "2:4", where=WEIGHTS), jc.gptq("int4", where=WEIGHTS)
    ),
    "low_rank_correction": lambda: jc.low_rank_correction(
        jc.quantize("int3", where=WEIGHTS), 2, WEIGHTS, whiten=True
    ),
}


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.ci if m == "gptq" else pytest.mark.slow) for m in IN_ORDER],
)
def test_layers_are_compressed_in_order(method):
    run = lambda params, batches: jc.compress_in_order(
        net, params, IN_ORDER[method](), batches, progress=False
    )
    got, want = run(*split()), run(PARAMS, X)
    if method == "low_rank_correction":  # Factors may change their signs together.
        got, want = jc.materialize(got), jc.materialize(want)
    assert_alike(got, want)


@pytest.mark.slow
def test_biases_are_corrected():
    def run(params, batches):
        uses = jc.uses(net, params, batches[0])
        small = jc.compress(params, jc.quantize("int2", where=WEIGHTS), uses=uses)
        stats = jc.calibrate(net, params, batches)
        return jc.correct_biases(net, params, small, batches[0], stats=stats).shifts

    got, want = run(*split()), run(PARAMS, X)
    assert set(want) == {"layers/b", "bias"}
    assert_alike(got, want)


@pytest.mark.slow
def test_rounding_is_learned():
    """Descent may end on the other side of a tie, for few codes."""

    def run(params, batches):
        uses = jc.uses(net, params, batches[0])
        small = jc.compress(params, jc.quantize("int3", 8, where=WEIGHTS), uses=uses)
        return small, jc.learn_rounding(net, params, small, batches, steps=60)

    (plain, got), (_, want) = run(*split()), run(PARAMS, X)
    error = lambda small: float(jnp.linalg.norm(jc.lift(net)(small, X[0]) - net(PARAMS, X[0])))
    assert error(got) < 0.8 * error(plain)
    for path in ("layers", "out"):
        pairs = zip(jax.tree.leaves(got[path]), jax.tree.leaves(want[path]), strict=True)
        assert np.mean([np.mean(np.asarray(a) == np.asarray(b)) for a, b in pairs]) > 0.98


# Each device has columns of its own, and the moments of all inputs.
BY_COLUMNS = {
    "gptq": lambda: jc.gptq("int3", 8, symmetric=False),
    "gptq, float4": lambda: jc.gptq("nf4", 8),
    "awq": lambda: jc.awq("int3", 8),
    "hqq": lambda: jc.hqq("int3", 8),
    "auto_round": lambda: jc.auto_round("int3", 8, steps=10),
    "sparse_gpt": lambda: jc.sparse_gpt(0.5),
    "prune": lambda: jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
}

LOOPS = ("gptq", "auto_round", "sparse_gpt")


@pytest.mark.parametrize(
    "solver",
    [pytest.param(s, marks=pytest.mark.ci if s in LOOPS else pytest.mark.slow) for s in BY_COLUMNS],
)
def test_columns_on_devices_of_their_own(solver):
    """Inside of `jax.shard_map`, where arrays that differ between devices are typed so."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    w, x = {"w": normal(0, 16, 32)}, normal(1, 64, 16)
    fn = lambda params, x: x @ params["w"]
    uses, stats, c = jc.uses(fn, w, x), jc.calibrate(fn, w, [x]), BY_COLUMNS[solver]()
    solve = lambda w, stats: jc.materialize(c.apply(w, c.init(w, uses=uses, stats=stats)))
    columns = P(None, "x")
    on_parts = jax.shard_map(solve, mesh=mesh, in_specs=(columns, P()), out_specs=columns)
    got = jax.jit(on_parts)(jax.device_put(w, NamedSharding(mesh, columns)), stats)
    parts = [{"w": w["w"][:, i : i + 4]} for i in range(0, 32, 4)]
    want = jnp.concatenate([solve(part, stats)["w"] for part in parts], 1)
    np.testing.assert_allclose(got["w"], want, rtol=1e-5, atol=1e-6)
