"""Floats of stored forms, trained to return what the dense function does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxopt_compress as jc
from jaxopt_compress.post_training.distill import _sizes

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.LargerWarning")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model(params, x):
    """Scanned layers, whose weights are of other sizes, between two products."""

    def layer(x, w):
        return x + jnp.tanh(x @ w["up"] * w["gain"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x @ params["in"], params["layers"])
    return x @ params["out"] + params["bias"]


SIZES = jnp.array([1.0, 100.0, 0.01])[:, None, None]
PARAMS = {
    "in": normal(0, 12, 8) / 4,
    "layers": {
        "up": normal(1, 3, 8, 16) / 3 * SIZES,
        "gain": 1 / SIZES[:, 0],
        "down": normal(2, 3, 16, 8) / 4,
    },
    "out": normal(3, 8, 6) / 3,
    "bias": jnp.zeros(6),
}
MIX = normal(9, 12, 12) / 3
SEEN = [normal(10 + i, 64, 12) @ MIX for i in range(4)]
UNSEEN = normal(30, 256, 12) @ MIX
WEIGHTS = ["in", "out", "layers/up", "layers/down"]
HALF = jc.schedules.constant(0.5)
METHODS = {
    "int2": lambda: jc.quantize("int2", 4, symmetric=False, where=WEIGHTS),
    "int2-bfloat16": lambda: jc.quantize("int2", 4, scale_dtype="bfloat16", where=WEIGHTS),
    "nf4": lambda: jc.quantize("nf4", where=WEIGHTS),
    "prune": lambda: jc.prune(jc.scores.magnitude(), HALF, where=WEIGHTS),
    "prune+int4": lambda: jc.chain(
        jc.prune(jc.scores.magnitude(), HALF, pattern="2:4", where=WEIGHTS),
        jc.quantize("int4", where=WEIGHTS),
    ),
    "low_rank": lambda: jc.low_rank(rank=3, where=WEIGHTS),
    "low_rank+int8": lambda: jc.chain(
        jc.low_rank(rank=3, where=WEIGHTS), jc.quantize("int8", where=WEIGHTS)
    ),
    "share": lambda: jc.share(4, where=WEIGHTS),
    "codes+factors": lambda: jc.low_rank_correction(jc.quantize("int2", where=WEIGHTS), 2, WEIGHTS),
}
USES = jc.uses(model, PARAMS, UNSEEN)


def error(small):
    want = model(PARAMS, UNSEEN)
    return float(jnp.linalg.norm(jc.lift(model)(small, UNSEEN) - want) / jnp.linalg.norm(want))


@pytest.mark.fast("int2", "prune+int4")
@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_nearer_and_only_floats_have_moved(method):
    """On inputs that were not trained on; codes, masks, dtypes and dense leaves are the same."""
    small = jc.compress(PARAMS, METHODS[method](), uses=USES)
    better = jc.distill(model, PARAMS, small, SEEN, steps=120, rate=1e-2)
    assert error(better) < 0.85 * error(small)
    assert jax.tree.structure(better) == jax.tree.structure(small)
    (_, rest), (_, kept) = jc.partition(small), jc.partition(better)
    jax.tree.map(np.testing.assert_array_equal, rest, kept)
    same = lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape)
    assert all(jax.tree.leaves(jax.tree.map(same, small, better)))
    np.testing.assert_array_equal(better["bias"], small["bias"])
    # The smallest and the largest entry of the stack have moved by a share of themselves.
    values = [jc.materialize(tree)["layers"]["up"] for tree in (small, better)]
    norms = jnp.linalg.norm(values[1] - values[0], axis=(1, 2)) / jnp.linalg.norm(
        values[0], axis=(1, 2)
    )
    assert np.all(np.asarray(norms) < 0.6), norms


def test_entries_that_are_a_small_part_of_the_outputs_learn_too():
    experts = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"])
    sizes = jnp.array([1.0, 1e-3, 1e-5])[:, None, None]
    params, x = {"w": normal(40, 3, 16, 12) * sizes}, normal(41, 3, 64, 16)
    small = jc.compress(params, jc.quantize("int2", 4), uses=jc.uses(experts, params, x))
    better = jc.distill(experts, params, small, [x], steps=40, rate=1e-2)
    gap = lambda p: experts(jc.materialize(p), x) - experts(params, x)
    lost = lambda p: np.linalg.norm(gap(p), axis=(1, 2))
    assert np.all(lost(better) < 0.9 * lost(small))


def test_dense_arrays_are_trained_where_they_are_named():
    small = jc.compress(PARAMS, METHODS["int2"](), uses=USES)
    better = jc.distill(model, PARAMS, small, SEEN, ("**/scale", "bias"), steps=40)
    assert np.all(better["bias"] != 0) and error(better) < error(small)
    alone = jc.distill(model, PARAMS, small, SEEN, "bias", steps=40)
    jax.tree.map(np.testing.assert_array_equal, small | {"bias": 0}, alone | {"bias": 0})


def test_a_loss_of_ones_own_and_another_optimizer():
    small = jc.compress(PARAMS, METHODS["int2"](), uses=USES)
    soft = lambda got, want: jc.distillation.soft_targets(got, want, 1.0).mean()
    off = lambda small: float(soft(jc.lift(model)(small, UNSEEN), model(PARAMS, UNSEEN)))
    better = jc.distill(
        model, PARAMS, small, SEEN, loss=soft, optimizer=optax.adamw(1e-2), steps=60
    )
    assert off(better) < 0.9 * off(small)


def test_what_is_not_better_on_held_out_batches_is_not_taken():
    small = jc.compress(PARAMS, METHODS["int2"](), uses=USES)
    wrong = lambda got, want: -jnp.mean(jnp.square(got - want))
    worse = jc.distill(model, PARAMS, small, SEEN, loss=wrong, steps=5)
    assert error(worse) > error(small)
    # By the squared differences of the loss with the other sign it is better.
    kept = jc.distill(model, PARAMS, small, SEEN[:1], held_out=[UNSEEN], steps=40, rate=3.0)
    assert kept is small


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda small: jc.distill(model, PARAMS, small, []), "0 batches and steps=100"),
        (lambda small: jc.distill(model, PARAMS, PARAMS, SEEN), "no floats in compressed leaves"),
        (lambda small: jc.distill(model, PARAMS, small, SEEN, "b"), "where='b' matches none"),
        (
            lambda small: jc.distill(model, PARAMS, small, [SEEN[0].at[0, 0].set(jnp.nan)]),
            "rate=0.003 has diverged: lower it",
        ),
    ],
)
def test_errors_say_what_would_work(call, message):
    small = jc.compress(PARAMS, jc.quantize("int4", where=WEIGHTS), uses=USES)
    with pytest.raises(ValueError, match=message):
        call(small)


def test_sizes_follow_every_axis():
    """Of a stack of factors whose entries, rows and columns are of other magnitudes."""
    scale = lambda n, axis: (
        10.0 ** jnp.arange(-n, n).reshape([-1 if d == axis else 1 for d in range(3)])
    )
    scales = scale(2, 0) * scale(3, 1) * scale(1, 2)
    signs = jnp.where(normal(0, *scales.shape) > 0, 1.0, -1.0)
    np.testing.assert_allclose(_sizes(signs * scales), scales, rtol=1e-5)
    np.testing.assert_array_equal(_sizes(scales), scales)
    np.testing.assert_array_equal(_sizes(jnp.zeros((2, 3))), jnp.ones((2, 3)))
    np.testing.assert_allclose(_sizes(jnp.array([[0.0, 0.0], [3.0, -4.0]])).min(), 2.5, rtol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_parameters_and_batches_learn_the_same(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    params = {"up": normal(1, 12, 16) / 3, "down": normal(2, 16, 8) / 4}
    split = {"up": put(params["up"]), "down": put(params["down"], None, "model")}
    c = jc.quantize("int2", 4)
    uses = jc.uses(fn, params, SEEN[0])
    got, want = (jc.compress(p, c, uses=uses) for p in (split, params))
    batches = [put(x, "data") for x in SEEN]
    with jax.set_mesh(mesh):
        got = jc.distill(fn, split, got, batches, steps=12)
    want = jc.distill(fn, params, want, SEEN, steps=12)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-3)
    scale = got["down"].scale
    assert scale.sharding.is_equivalent_to(put(scale, None, "model").sharding, 2)
