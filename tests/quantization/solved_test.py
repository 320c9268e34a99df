"""Methods that need data: the contract, parts on several devices, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import NeedsStats
from jaxopt_compress.compression.output_error import output_error
from tests.compression import laws

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")

SHAPES = {"even": (8, 6), "stack": (3, 8, 4)}
DTYPES = {"even": np.dtype(np.float32), "stack": np.dtype(ml_dtypes.bfloat16)}

METHODS = {
    "gptq": lambda: jc.gptq("int4"),
    "gptq-grouped-asymmetric": lambda: jc.gptq("int2", 4, symmetric=False),
    "gptq-nf4": lambda: jc.gptq("nf4"),
    "auto_round": lambda: jc.auto_round("int3", symmetric=False),
    "awq": lambda: jc.awq("int4", 4, symmetric=False),
    "smooth_quant": lambda: jc.smooth_quant(),
    "sparse_gpt": lambda: jc.sparse_gpt(0.4),
    "sparse_gpt-2:4": lambda: jc.sparse_gpt(0.5, "2:4"),
    "sparse_gpt-rounds": lambda: jc.sparse_gpt(0.5, rounds=5),
    "prune+reconstruct": lambda: jc.chain(
        jc.prune(jc.scores.magnitude(), pattern="2:4"), jc.reconstruct(rounds=5)
    ),
    "sparse_gpt+gptq": lambda: jc.chain(jc.sparse_gpt(0.5, "2:4"), jc.gptq("int4")),
    "prune+gptq": lambda: jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
        jc.gptq("int4", symmetric=False),
    ),
    "gptq+prune": lambda: jc.chain(
        jc.gptq("int4"), jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
    ),
    "low_rank+gptq": lambda: jc.chain(jc.low_rank(rank=2), jc.gptq("int4")),
}


def experts(params, x):
    """A product, and one per entry of a stack, whose inputs are of other sizes."""
    sizes = jnp.array([1.0, 10.0, 0.1])[:, None, None]
    return x @ params["even"], jnp.matmul(x * sizes, params["stack"].astype(x.dtype))


@functools.cache
def measured():
    params = {
        name: laws.values(i, "normal", shape, DTYPES[name])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    # Entries of a stack of sizes of their own.
    params["stack"] = params["stack"] * jnp.array([1, 64, 0.015625], jnp.bfloat16)[:, None, None]
    mix = np.random.default_rng(5).standard_normal((8, 8))
    x = jnp.asarray(np.random.default_rng(4).standard_normal((64, 8)) @ mix, jnp.float32)
    return params, jc.uses(experts, params, x), jc.calibrate(experts, params, [x]), x


@pytest.mark.fast("gptq-grouped-asymmetric")
@pytest.mark.parametrize("method", METHODS)
def test_stored_form_is_the_view_bit_for_bit(method):
    params, uses, stats, x = measured()
    c = METHODS[method]()
    state = c.init(params, uses=uses, stats=stats)
    laws.check_contract(programs(c), params, state)
    pruned = [k for k in ("prune", "sparse_gpt") if k in laws.kinds(state)]
    if pruned:
        view = jc.materialize(c.apply(params, state))
        zeros = [np.mean(np.asarray(view[p], np.float32) == 0) for p in params]
        assert min(zeros) > 0.39
    # It runs in a lifted function, as the dense form does.
    small = c.compress(params, state)
    got = jc.lift(experts, on_fallback="error")(small, x)
    want = experts(jc.materialize(small), x)
    # Rounded activations; and bfloat16 weights, which products of codes do not round.
    tolerance = 0.02 if method == "smooth_quant" else 2.0**-8
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.max(jnp.abs(b))))


def programs(c):
    """The compiled forms, as of the methods without data."""
    return laws.Programs(
        c,
        c.init,
        jax.jit(c.apply),
        jax.jit(laws.consume),
        jax.jit(lambda params, state, x: laws.consume(c.apply(params, state), x)),
        jax.jit(lambda small, x: laws.consume(jc.materialize(small), x)),
        jax.jit(jc.materialize),
    )


@pytest.mark.slow
def test_states_stay_the_same_in_training():
    params, uses, stats, _ = measured()
    c = jc.chain(jc.sparse_gpt(0.5), jc.gptq("int4"))
    state = c.init(params, uses=uses, stats=stats)
    moved = jax.tree.map(lambda w: w + 1, params)
    new = jax.jit(c.update)(state, moved)
    laws.assert_same_bits(c.apply(moved, new), c.apply(params, state))
    slopes = jax.grad(lambda p: jnp.sum(c.apply(p, state)["even"]))(params)
    assert not np.any(slopes["even"])


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        (jc.gptq("int4"), jc.gptq("int4", scale_dtype="bfloat16")),
        (jc.auto_round("int4"), jc.auto_round("int4", per="tensor")),
        (jc.awq("int4"), jc.awq("int4", scale_dtype="bfloat16")),
        (jc.hqq("int4"), jc.hqq("int4", per="tensor")),
        (jc.smooth_quant("int4"), jc.smooth_quant("int4", scale_dtype="bfloat16")),
    ],
    ids=["gptq", "auto_round", "awq", "hqq", "smooth_quant"],
)
def test_states_of_other_grids_are_refused(held, asked):
    params, uses, stats, _ = measured()
    state = jax.eval_shape(lambda p: held.init(p, uses=uses, stats=stats), params)
    with pytest.raises(ValueError, match=r"the recipe asks for .*, and the state holds"):
        asked.update(state, params)


@pytest.mark.ci
def test_pruned_parameters_move_under_the_mask():
    params, uses, stats, _ = measured()
    c = jc.sparse_gpt(0.5)
    state = c.init(params, uses=uses, stats=stats)
    slopes = jax.grad(lambda p: jnp.sum(c.apply(p, state)["even"]))(params)["even"]
    np.testing.assert_array_equal(np.asarray(slopes) == 1, c.apply(params, state)["even"] != 0)
    assert set(np.unique(slopes)) == {0.0, 1.0}


SHARDED = {
    **METHODS,
    "auto_round-relaxed": lambda: jc.auto_round("int3", method="relaxed", steps=50),
    "hqq": lambda: jc.hqq("int3"),
    "low_rank_correction": lambda: jc.low_rank_correction(jc.quantize("int3"), rank=2, whiten=True),
}

SPLIT_IN_CI = ("gptq-grouped-asymmetric", "auto_round-relaxed", "sparse_gpt-2:4")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=pytest.mark.ci if m in SPLIT_IN_CI else pytest.mark.slow)
        for m in SHARDED
    ],
)
def test_split_inputs_and_parameters_give_the_same_codes(method):
    """On eight devices. Inputs are integers, whose sums are exact in any order."""
    params, uses, _, x = measured()
    x = jnp.round(4 * x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def split(value, *axes):
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))

    def small(params, x):
        stats = jc.calibrate(experts, params, [x])
        return jc.compress(params, SHARDED[method](), uses=uses, stats=stats)

    own = {"even": split(params["even"], "data"), "stack": split(params["stack"], None, "data")}
    got, want = small(own, split(x, "data")), small(params, x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            wide = (np.asarray(v, np.float32) for v in (a, b))
            np.testing.assert_allclose(*wide, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "method", [jc.gptq("int4"), jc.auto_round("int4"), jc.awq("int4"), jc.smooth_quant()]
)
def test_missing_statistics_are_named_before_anything_is_computed(method):
    with pytest.raises(NeedsStats, match=r"'even' of shape \(8, 6\).*calibrate"):
        jc.compress({"even": jnp.ones((8, 6))}, method)


def test_sparse_gpt_needs_statistics_too():
    with pytest.raises(NeedsStats, match=r"sparse_gpt needs second moments.*'even'"):
        jc.compress({"even": jnp.ones((8, 6))}, jc.sparse_gpt(0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jc.gptq("int4", damping=0), "damping=0; it is above 0"),
        (lambda: jc.auto_round("nf4"), "it rounds to integers, such as 'int4'"),
        (lambda: jc.awq("binary"), "the mean magnitude"),
        (lambda: jc.hqq("mxfp4"), "float8_e8m0fnu"),
        (lambda: jc.hqq("int4", power=2), "0 < power <= 1"),
        (lambda: jc.smooth_quant(alpha=2), "between 0 and 1"),
        (lambda: jc.sparse_gpt(1.5), "between 0 and 1"),
        (lambda: jc.sparse_gpt(0.4, "2:4"), r"write sparse_gpt\(0.5, '2:4'\)"),
        (lambda: jc.sparse_gpt(0.5, "4:2"), "'n:m' with 0 < n < m"),
    ],
)
def test_wrong_options_say_what_works(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_best_of_takes_solvers():
    params, uses, stats, _ = measured()
    c = jc.best_of(jc.quantize("int3"), jc.gptq("int3"), stats=stats)
    assert c.init(params, uses=uses, stats=stats).chosen == {"even": 1, "stack": 1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "auto_round"])
def test_layers_in_order_are_decided_one_by_one_and_stacked(method):
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 30.0])[:, None, None]
    params = {"w": jnp.asarray(rng.standard_normal((2, 8, 8)) * sizes, jnp.float32)}

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    c = getattr(jc, method)("int4")
    small = jc.compress_in_order(scanned, params, c, [x], progress=False)
    stats = jc.calibrate(scanned, params, [x])
    whole = jc.compress(params, c, uses=jc.uses(scanned, params, x), stats=stats)
    assert jax.tree.structure(small) == jax.tree.structure(whole)
    # The first layer sees the same inputs in both; the second those behind the first.
    first = lambda tree: jc.materialize(tree)["w"][0]
    np.testing.assert_allclose(first(small), first(whole), atol=1e-5)
    assert output_error(params["w"], small["w"].materialize(), stats["w"][0]).whole < 0.1
