"""What `lift` promises besides numbers: what it leaves alone, what it says, what survives it."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.lift.compressed import KINDS, assert_close, made, small_params
from tests.lift.layer import PARAMS, SMALL, X, dense_layer


def sorts_its_weight(params, x):
    return x @ jnp.sort(params["mlp"]["w"], axis=0)


def test_a_dense_tree_gives_the_jaxpr_of_the_function():
    for name in ("linen_scanned_transformer", "custom_vjp_of_weight", "shard_map_data_parallel"):
        fn, params, args, _ = made(name)
        assert str(jax.make_jaxpr(jc.lift(fn))(params, *args)) == str(
            jax.make_jaxpr(fn)(params, *args)
        )


def test_error_names_primitive_path_and_source_line():
    lines, start = inspect.getsourcelines(sorts_its_weight)
    with pytest.raises(jc.FallbackError) as error:
        jc.lift(sorts_its_weight, on_fallback="error")(SMALL, X)
    text = str(error.value)
    assert "'sort'" in text and "'mlp/w'" in text and "(16, 24)" in text
    assert f"lift_test.py:{start + len(lines) - 1}" in text


def test_warn_warns_once_per_place():
    def twice(params, xs):
        return (
            jax.lax.map(lambda x: sorts_its_weight(params, x), xs)
            + jnp.sort(params["mlp"]["w"])[0, 0]
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(jc.lift(twice))(SMALL, jnp.stack([X, X]))
    places = [str(w.message) for w in caught if w.category is jc.FallbackWarning]
    assert len(places) == 2 and len(set(places)) == 2, places


def test_densify_is_silent_and_right():
    with warnings.catch_warnings():
        warnings.simplefilter("error", jc.FallbackWarning)
        got = jc.lift(sorts_its_weight, on_fallback="densify")(SMALL, X)
    assert_close(got, sorts_its_weight(jc.materialize(SMALL), X))


def test_policies_are_checked():
    with pytest.raises(ValueError, match=r"'maybe'.*warn, error, densify"):
        jc.lift(dense_layer, on_fallback="maybe")


def test_static_arguments_stay_static():
    def fn(params, x, transposed, mode, times, nothing, *, scale=1):
        assert transposed is False and mode == "tanh" and times == 3 and nothing is None
        for _ in range(times):
            x = x @ params["mlp"]["w"] @ params["mlp"]["w"].T / scale
        return getattr(jnp, mode)(x)

    call = lambda fn, params: fn(params, X, False, "tanh", 3, None, scale=100)
    assert_close(call(jc.lift(fn, "error"), SMALL), call(fn, jc.materialize(SMALL)))


def test_keyword_and_numpy_arguments():
    got = jc.lift(dense_layer, "error")(x=np.asarray(X), params=SMALL)
    assert_close(got, dense_layer(jc.materialize(SMALL), X))


def test_numpy_leaves_beside_compressed_ones():
    small = {"mlp": {"w": SMALL["mlp"]["w"], "b": np.ones(24, "float32")}}
    assert_close(jc.lift(dense_layer, "error")(small, X), dense_layer(jc.materialize(small), X))


def test_compressed_leaves_pass_through():
    step = lambda params, x: (params, dense_layer(params, x))
    params, _ = jax.jit(jc.lift(step, "error"))(SMALL, X)
    assert jax.tree.structure(params) == jax.tree.structure(SMALL)
    assert jnp.array_equal(params["mlp"]["w"].codes, SMALL["mlp"]["w"].codes)


def test_a_closure_over_a_compressed_array_is_refused_by_name():
    with pytest.raises(TypeError, match=r"QuantizedArray of shape .*pass it as an argument"):
        jc.lift(lambda x: x @ SMALL["mlp"]["w"])(X)


def test_the_lifted_function_keeps_its_name_and_signature():
    lifted = jc.lift(dense_layer)
    assert lifted.__name__ == "dense_layer"
    assert inspect.signature(lifted) == inspect.signature(dense_layer)


@pytest.mark.slow
def test_eager_calls_work_for_every_kind():
    for kind in KINDS:
        small = small_params("concatenate_inputs", kind)
        fn, _, args, _ = made("concatenate_inputs")
        assert_close(jc.lift(fn, "error")(small, *args), fn(jc.materialize(small), *args))


def test_outer_trace_values_may_be_closed_over():
    def outer(params, x, shift):
        return jc.lift(lambda params: dense_layer(params, x) + shift, "error")(params)

    got = jax.jit(outer)(SMALL, X, 2.0)
    assert_close(got, dense_layer(jc.materialize(SMALL), X) + 2.0)


def test_name_stacks_survive():
    def fn(params, x):
        with jax.named_scope("projection"):
            x = x @ params["mlp"]["w"]
        with jax.named_scope("activation"):
            return jnp.sin(x)

    lowered = jax.jit(jc.lift(fn, "error")).lower(SMALL, X).as_text(debug_info=True)
    assert "projection/dot_general" in lowered
    assert "activation/sin" in lowered


def _dots(jaxpr):
    """How many products a jaxpr holds, bodies included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        inner = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
        count += sum(_dots(getattr(j, "jaxpr", j)) for j in inner if hasattr(j, "eqns"))
    return count


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_checkpoint_policies_survive(policy):
    """Saving products or not decides how many of them the gradient has."""

    @functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, policy))
    def fn(params, x):
        return jnp.sin(jnp.sin(x @ params["mlp"]["w"]) @ params["mlp"]["w"].T)

    def scanned(params, x):
        return jax.lax.scan(lambda x, _: (fn(params, x), None), x, length=3)[0]

    def products(fn, params):
        grad = jax.grad(lambda x: jnp.sum(fn(params, x)))
        return _dots(jax.make_jaxpr(grad)(X).jaxpr)

    for fn_ in (fn, scanned):
        assert products(jc.lift(fn_, "error"), SMALL) == products(fn_, PARAMS)


@pytest.mark.ci
@pytest.mark.parametrize(
    "compression",
    [
        jc.quantize("int8"),
        jc.quantize("nf4", group_size=32),
        jc.quantize("int3"),
        jc.quantize("int8", activations="int8"),
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)),
        jc.low_rank(rank=2),
    ],
    ids=["int8", "nf4", "int3", "int8 x int8", "pruned", "rank 2"],
)
def test_scans_keep_codes_for_the_way_back(compression):
    """Not weights, which would be in memory as they were before compression, for all layers."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 64)), jnp.float32)}
    x = jnp.ones((5, 64))

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    def kept(fn, params):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, params: fn(params, x).sum()))(x, params)
        scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        assert len(scans) == 2
        return [v.aval.shape for v in scans[0].outvars if v.aval.size > 3 * x.size]

    small = jc.compress(params, compression, uses=jc.uses(fn, params, x))
    assert kept(jc.lift(fn, "error"), small) == kept(fn, params) == []


def test_remat_saves_as_little_as_it_does_with_dense_weights():
    def residual_bytes(fn, params):
        fn = jax.checkpoint(fn)
        _, pull = jax.eval_shape(lambda x: jax.vjp(lambda x: fn(params, x), x), X)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

    deep = lambda params, x: dense_layer(params, jnp.sin(jnp.sin(x)))
    assert residual_bytes(jc.lift(deep, "error"), SMALL) < residual_bytes(deep, PARAMS)


@jax.custom_vjp
def reversed_gradient(x):
    """The identity, with the opposite gradient."""
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def test_custom_rules_are_used_for_activations_and_for_weights():
    of_activation = lambda params, x: reversed_gradient(x @ params["mlp"]["w"]).sum()
    of_weight = lambda params, x: (x @ reversed_gradient(params["mlp"]["w"])).sum()
    floats, rest = jc.partition(SMALL)
    for fn, sign in ((of_activation, -1), (of_weight, -1)):
        grad = lambda fn: jax.grad(lambda f: jc.lift(fn, "densify")(jc.combine(f, rest), X))(floats)
        plain = grad(lambda params, x: (x @ params["mlp"]["w"]).sum())
        got = grad(fn)
        assert_close(got["mlp"]["w"].scale, sign * plain["mlp"]["w"].scale, 1e-4)


@pytest.mark.ci
def test_custom_rules_may_close_over_arrays():
    """JAX makes operands of them, for which there are no derivatives."""
    gate = jnp.arange(5.0)

    @jax.custom_vjp
    def gated(x, w):
        return (x @ w) * gate

    gated.defvjp(
        lambda x, w: (gated(x, w), (x, w)),
        lambda kept, g: (2 * (g * gate) @ kept[1].T, kept[0].T @ (g * gate)),
    )
    loss = lambda params, x: jnp.sum(gated(x, params["w"]) ** 2)
    w = jax.random.normal(jax.random.key(0), (7, 5))
    small = jc.compress({"w": w}, jc.quantize("int8"), layout="in,out")
    x = jax.random.normal(jax.random.key(1), (2, 7))
    got = jax.grad(jc.lift(loss), 1)(small, x)
    assert_close(got, jax.grad(loss, 1)(jc.materialize(small), x), 1e-4)


def test_donated_fields_are_reused():
    step = jax.jit(jc.lift(lambda params, x: (params, x), "error"), donate_argnums=0)
    mine = jax.tree.map(jnp.copy, SMALL)
    out, _ = step(mine, X)
    assert mine["mlp"]["w"].codes.is_deleted()
    assert jnp.array_equal(out["mlp"]["w"].codes, SMALL["mlp"]["w"].codes)
