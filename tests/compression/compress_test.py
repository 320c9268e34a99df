import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.compression import as_compression

W = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32))
PARAMS = {"embed": W, "mlp": [{"kernel": W + 1, "bias": W[0]}, {"kernel": W + 2}]}
INT8, INT4 = jc.quantize("int8"), jc.quantize("int4")


def bits(small):
    leaves = jax.tree.leaves(small, is_leaf=lambda x: isinstance(x, jc.QuantizedArray))
    return [x.bits if isinstance(x, jc.QuantizedArray) else 32 for x in leaves]


def test_first_pattern_that_matches_wins():
    assert bits(jc.compress(PARAMS, {"mlp/0/*": INT8, "**/kernel": INT4})) == [32, 32, 8, 4]
    with pytest.raises(ValueError, match=r"recipe='mlp/0/kernel' gets no leaf.*narrower"):
        jc.compress(PARAMS, {"**/kernel": INT4, "mlp/0/kernel": INT8})


def test_what_no_pattern_matches_stays():
    small = jc.compress(PARAMS, {"embed": INT8})
    assert small["mlp"][1]["kernel"] is PARAMS["mlp"][1]["kernel"]


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"**/kernle": INT8}, ValueError, r"recipe='\*\*/kernle' matches no leaf.*mlp/0/kernel"),
        ({}, TypeError, "a mapping of globs to Compressions; this is empty"),
        ({"embed": "int8"}, TypeError, "this one maps 'embed' to 'int8'"),
        ({"embed": jc.low_rank(rank=9)}, ValueError, r"rank=9 .* limit 4 of 'embed' .*\(8, 4\)"),
    ],
)
def test_errors(recipe, error, message):
    with pytest.raises(error, match=message):
        jc.compress(PARAMS, recipe)


def test_a_late_rule_refuses_before_an_early_one_computes():
    def score(parameter):
        assert isinstance(parameter.value, jax.core.Tracer), "computed"
        return jnp.abs(parameter.value)

    recipe = {
        "embed": jc.prune(score, jc.schedules.constant(0.5)),
        "**/kernel": jc.low_rank(rank=9),
    }
    with pytest.raises(ValueError, match="'mlp/0/kernel' of shape"):
        jc.compress(PARAMS, recipe)


def test_state_decides_what_is_stored():
    c = as_compression({"**/kernel": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))})
    tx = optax.chain(optax.clip(1.0), jc.compressed_training(optax.sgd(0.1), c))
    opt_state = tx.init(PARAMS)
    moved = jax.tree.map(lambda w: -3 * w[::-1], PARAMS)
    view = c.view(moved, opt_state)
    small = jc.compress(moved, c, state=opt_state)
    np.testing.assert_array_equal(
        jc.materialize(small)["mlp"][1]["kernel"], view["mlp"][1]["kernel"]
    )
    with pytest.raises(ValueError, match=r"asks for quantize\('int4'\), and the state holds prune"):
        jc.compress(moved, {"mlp/0/kernel": INT4}, state=opt_state)
    state = c.init(PARAMS)
    small = jc.compress(moved, c, state=state)
    np.testing.assert_array_equal(
        jc.materialize(small)["mlp"][0]["kernel"], c.apply(moved, state)["mlp"][0]["kernel"]
    )


def test_uses_of_another_tree_are_refused():
    found = jc.uses(lambda p, x: x @ p["params"]["w"], {"params": {"w": W}}, W.T)
    with pytest.raises(ValueError, match="uses name params/w, and the parameters are w"):
        jc.compress({"w": W}, jc.quantize("int8", where="w"), uses=found)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"holds no compression.*compressed_training"):
        jc.compress(PARAMS, INT8, state=optax.adam(1e-3).init(PARAMS))
    state = INT8.init({"other": W})
    with pytest.raises(ValueError, match="made for: other; it has embed, mlp/0/bias"):
        jc.compress(PARAMS, INT8, state=state)
    with pytest.raises(ValueError, match="made for: other"):
        INT8.apply(PARAMS, state)


def test_what_is_no_array_stays():
    params = {"w": W, "activation": jax.nn.relu, "name": "mlp", "none": None}
    small = jc.compress(
        params, jc.chain(jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), INT8)
    )
    assert small["activation"] is jax.nn.relu and small["name"] == "mlp"


def test_what_started_from_statistics_needs_none_again():
    """The state knows the axes and the steps: nothing is asked for, and nothing is warned about."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 8, 4)), jnp.float32)}
    names = ("NHWC", "HWIO", "NHWC")
    image = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=names
    )
    x = jnp.ones((1, 4, 4, 8))
    given = {"uses": jc.uses(image, params, x), "stats": jc.calibrate(image, params, [x])}
    for c in (jc.lsq("int4", activations=jc.activations("uint4", "learned")), jc.quantize("int4")):
        state = jc.compressed_training(optax.sgd(0.1), c, **given).init(params)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            small = jc.compress(params, c, state=state)
        np.testing.assert_array_equal(
            jc.materialize(small)["w"], jc.materialize(c.view(params, state))["w"]
        )


def test_states_of_uses_need_none_again():
    """Axes that assumptions would get wrong, and a leaf that has no use, are known to the state."""
    params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((5, 64))), "pos": W[:5, :3]}
    c, x = jc.quantize("int4", group_size=32), jnp.ones((2, 64))
    uses = jc.uses(lambda p, x: x @ p["w"].T, params, x)
    tx = jc.compressed_training(optax.sgd(0.1), c, uses=uses)
    small = jc.compress(params, c, state=tx.init(params))
    assert small["w"].scale.shape == (5, 2) and small["pos"] is params["pos"]


def test_states_of_split_factors():
    """What is asked for is found from shapes alone, whatever mesh parameters lie on."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    c = jc.chain(jc.low_rank(rank=2), INT8)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(W, NamedSharding(mesh, P("model")))}
        state = jc.compressed_training(optax.sgd(0.1), c).init(params)
        small = jc.compress(params, c, state=state)
    assert isinstance(small["w"].u, jc.QuantizedArray)
    with pytest.raises(ValueError, match=r"has 2 parts, and the state holds quantize\('int8'\)"):
        jc.compress(params, c, state=INT8.init(params))


@pytest.mark.parametrize(
    "other",
    [
        jc.quantize("int2"),
        jc.quantize("int8", group_size=4),
        jc.quantize("int8", symmetric=False),
        jc.quantize("int8", activations="int8"),
        jc.quantize("int8", where="nothing"),
        jc.low_rank(rank=2),
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
    ],
)
def test_the_state_of_other_settings_is_refused(other):
    params = {"a": jnp.linspace(-1, 1, 64).reshape(8, 8)}
    state = jc.compressed_training(optax.sgd(0.1), INT8).init(params)
    for call in (
        lambda: jc.compress(params, other, state=state),
        lambda: other.view(params, state),
        lambda: other.update(state.compression, params),
    ):
        with pytest.raises(ValueError, match=r"asks for .*state holds quantize\('int8'\) of a"):
            call()


def test_a_parameter_that_the_state_was_made_without_is_refused():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones(8)}
    state = jc.compressed_training(optax.sgd(0.1), INT8).init(params)
    jc.compress({**params, "c": jnp.ones(8)}, INT8, state=state)
    with pytest.raises(ValueError, match="made without c/kernel, which would stay"):
        jc.compress({**params, "c": {"kernel": jnp.ones((8, 8))}}, INT8, state=state)


def test_the_same_call_written_otherwise_is_the_same():
    params = {"a": jnp.ones((8, 8))}
    c = jc.quantize("int8", None, True, activations=jc.activations("int8"))
    state = c.init(params)
    again = jc.quantize("int8", activations="int8", freeze=3)
    assert jax.tree.leaves(again.apply(params, state))[0].shape == (8, 8)


@pytest.mark.fast("int8_tensor", "low_rank")
@pytest.mark.parametrize("name", ["int8_tensor", "prune", "n:m", "low_rank", "lsq"])
def test_members_of_an_ensemble_are_compressed_apart(name):
    """`stack=1`: of very different sizes, each member is as it would be alone."""
    sizes = jnp.array([1.0, 1e-3, 1e2])[:, None, None]
    members = {"w": jax.random.normal(jax.random.key(0), (3, 16, 8)) * sizes}
    model = lambda p, x: x @ p["w"]
    x = jax.random.normal(jax.random.key(1), (4, 16))
    uses = jc.uses(jax.vmap(model, (0, None)), members, x)
    make = {
        "int8_tensor": lambda **o: jc.quantize("int8", per="tensor", **o),
        "prune": lambda **o: jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), **o),
        "n:m": lambda **o: jc.prune(
            jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4", **o
        ),
        "low_rank": lambda **o: jc.low_rank(rank=2, **o),
        "lsq": lambda **o: jc.lsq("int4", per="tensor", **o),
    }[name]
    small = jc.compress(members, make(stack=1), uses=uses)
    for i in range(3):
        alone = jax.tree.map(lambda w, i=i: w[i], members)
        want = jc.materialize(jc.compress(alone, make(), uses=jc.uses(model, alone, x)))
        np.testing.assert_array_equal(jc.materialize(small)["w"][i], want["w"])
    got = jax.vmap(jc.lift(model), (0, None))(small, x)
    dense = jax.vmap(model, (0, None))(jc.materialize(small), x)
    np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-5 * float(jnp.abs(dense).max()))


def test_stack_of_an_axis_that_is_summed_over_is_refused():
    params = {"w": jnp.ones((16, 8))}
    uses = jc.uses(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    with pytest.raises(ValueError, match=r"stack=1 of 'w' of shape \(16, 8\).*sums over axes"):
        jc.compress(params, jc.quantize("int8", stack=1), uses=uses)
    with pytest.raises(ValueError, match="stack=2 of 'w'"):
        jc.compress(params, jc.quantize("int8", stack=2))
    with pytest.raises(ValueError, match=r"stack=1\.5; it is a number of leading axes"):
        jc.compress(params, jc.quantize("int8", stack=1.5))


def test_stack_of_vectors():
    vectors = {"b": jnp.array([[1.0, 2.0], [100.0, 50.0]])}
    small = jc.compress(vectors, jc.quantize("int8", where="b", stack=1))
    assert small["b"].scale.shape == (2, 1)


@pytest.mark.parametrize("layout", ["in,out", "out,in"])
def test_a_layout_stands_for_uses(layout):
    turned = layout == "out,in"
    params = {"w": W.T if turned else W, "conv": jnp.ones((2, 3, 4, 5)), "b": jnp.ones(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = jc.compress(params, INT8, layout=layout)
        state = jc.compressed_training(optax.sgd(0.1), INT8, layout=layout).init(params)
    plain = jc.compress({"w": W}, INT8)["w"]
    np.testing.assert_array_equal(small["w"].scale, plain.scale.T if turned else plain.scale)
    assert small["conv"].scale.shape == ((2, 1, 1, 1) if turned else (1, 1, 1, 5))
    assert jax.tree.structure(jc.compress(params, INT8, state=state)) == jax.tree.structure(small)


def test_an_assumed_layout_is_always_said():
    with pytest.warns(jc.AssumedLayout, match=r"axes of w .*uses=.*layout='out,in'"):
        jc.compress({"w": W}, INT8)
    uses = jc.uses(lambda p, x: x @ p["w"], {"w": W}, W.T)
    with pytest.raises(ValueError, match=r"layout='out,in' cannot be given with uses="):
        jc.compress({"w": W}, INT8, uses=uses, layout="out,in")
    with pytest.raises(ValueError, match="layout='oi'; there are 'in,out' and 'out,in'"):
        jc.compress({"w": W}, INT8, layout="oi")


def test_a_larger_stored_form_is_said():
    params = {"w": jnp.ones((16, 16)), "v": jnp.ones((64, 64))}
    later = jc.prune(jc.scores.magnitude(), jc.schedules.polynomial(0.9, begin=5, end=50))
    with pytest.warns(jc.LargerWarning, match=r"of v, w is larger .*\(v: .*was state= forgotten"):
        small = jc.compress(params, later)
    assert "0.97 (larger)" in str(jc.report(params, small))
    with pytest.warns(jc.LargerWarning, match="form of w is larger"):
        jc.compress(params, jc.low_rank(rank=9, where="w"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", jc.LargerWarning)
        jc.compress(params, jc.low_rank(rank=7, where="w"))
