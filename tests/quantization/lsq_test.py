"""Learned steps of weights: gradients, the contract, and training."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import as_compression
from jaxopt_compress.compression.states import learned_parts, replace_learned, training_states
from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.numerics.learned import REACH
from tests.quantization import cases
from tests.quantization.cases import assert_same_bits
from tests.quantization.learned import (
    ANSWERS,
    COTANGENT,
    X,
    answer,
    mlp,
    mlp_params,
    steady,
    train,
    with_learned,
)


def pulled(c, step):
    """View, and gradients at parameter and step, for the known answers' input."""
    state = with_learned(jax.jit(c.init)({"w": X.T}), scale=step)

    @jax.jit
    def run(w, learned):
        apply = lambda w, learned: c.apply({"w": w}, state._replace(learned=learned))["w"]
        view, pull = jax.vjp(apply, w, learned)
        return view, *pull(COTANGENT.T)

    view, w_grad, learned = run(X.T, state.learned)
    return view.T, w_grad.T, learned["w"]["scale"]


def test_gradients_of_the_paper():
    want = answer("lsq_paper_int4")
    view, w_grad, step_grad = pulled(jc.lsq("int4"), jnp.asarray(want["scale"])[None])
    np.testing.assert_array_max_ulp(np.asarray(view), want["y"])
    # torch multiplies by the step and its reciprocal.
    np.testing.assert_allclose(w_grad, want["grad_x"], rtol=2e-7, atol=0)
    scaled = want["grad_scale"] * ANSWERS["grad_factor"]
    np.testing.assert_allclose(step_grad[0], scaled, rtol=2e-5)


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_gradients_of_torch(per):
    """Equal but where torch decides by the rounded value whether it was clipped."""
    want = answer(f"lsq_{per}_int4")
    step = jnp.asarray(want["scale"])[None]
    step = step if per == "channel" else step.reshape(1, 1)
    view, w_grad, step_grad = pulled(jc.lsq("int4", per=per), step)
    np.testing.assert_array_max_ulp(np.asarray(view), want["y"])
    v = np.asarray(X / step.T)
    border = (np.abs(np.round(v) + 0.5) <= 7.5) & ~((v > -8) & (v < 7))
    np.testing.assert_allclose(
        np.asarray(w_grad)[~border], want["grad_x"][~border], rtol=2e-7, atol=0
    )
    # There torch's derivative is that of rounding alone.
    beyond = np.where(border, COTANGENT * v, 0) * ANSWERS["grad_factor"]
    torch_grad = want["grad_scale"] + (beyond.sum(1) if per == "channel" else beyond.sum())
    # Its factor counts the 64 entries of a row in both cases.
    factor = 1 if per == "channel" else 1 / math.sqrt(X.shape[0])
    np.testing.assert_allclose(
        np.ravel(step_grad), np.ravel(torch_grad) * factor, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "group", "per"),
    [
        ("int3", 4, "channel"),
        ("uint4", None, "channel"),
        ("ternary", None, "tensor"),
    ],
)
def test_derivatives_are_the_formula(name, group, per):
    fmt, w = format_of(name), np.asarray(steady(3, 8, 6))
    w = np.abs(w) if name[0] == "u" else w
    c = jc.lsq(name, group, per=per)
    state = jax.jit(c.init)({"w": jnp.asarray(w)})
    step = np.asarray(state.learned["w"]["scale"])
    wide = np.repeat(step, group, 0) if group else np.broadcast_to(step, w.shape)
    v = w / wide
    inside = (v > fmt.grid.low) & (v < fmt.grid.high)
    level = np.clip(np.round(v), fmt.grid.low, fmt.grid.high)
    out = np.asarray(steady(4, 8, 6))
    moved = {"w": {"scale": jnp.ones_like(step)}}

    @jax.jit
    def both(w, learned):
        apply = lambda w, learned: c.apply({"w": w}, state._replace(learned=learned))["w"]
        view, pull = jax.vjp(apply, w, learned)
        pushed = jax.jvp(apply, (w, learned), (jnp.ones(w.shape), moved))[1]
        return view, pull(jnp.asarray(out)), pushed

    view, (w_grad, step_grad), pushed = both(jnp.asarray(w), state.learned)
    np.testing.assert_allclose(view, level * wide, rtol=1e-6)
    np.testing.assert_array_equal(w_grad, np.where(inside, out, 0))
    slope = np.where(inside, level - v, level) * out / math.sqrt(48 / step.size * fmt.grid.high)
    parts = slope.reshape(step.shape[0], -1, step.shape[1], 6 // step.shape[1]).sum((1, 3))
    np.testing.assert_allclose(step_grad["w"]["scale"], parts, rtol=2e-5, atol=1e-6)
    # Both modes of differentiation.
    np.testing.assert_allclose(
        jnp.vdot(pushed, out), w_grad.sum() + step_grad["w"]["scale"].sum(), rtol=1e-5
    )


OPTIONS = {
    "channel": ("int4", {}),
    "tensor": ("int2", {"per": "tensor"}),
    "group_size": ("int3", {"group_size": 16}),
    "tile": ("int8", {"group_size": (16, 4)}),
    "pad": ("int4", {"group_size": 16, "pad": True}),
    "ternary": ("ternary", {}),
}


def test_stored_form_is_the_view():
    """In every dtype, from subnormals to the largest floats, with steps that have moved."""
    c = as_compression({name: jc.lsq(fmt, **given) for name, (fmt, given) in OPTIONS.items()})
    init, apply, compress = map(jax.jit, (c.init, c.apply, c.compress))
    materialize, update = jax.jit(jc.materialize), jax.jit(c.update)
    for extreme in (False, True):
        params = {}
        for i, name in enumerate(OPTIONS):
            dtype, shape = cases.DTYPES[i % 3], cases.RAGGED if name == "pad" else cases.SHAPE
            x = cases.extreme(i, shape, dtype) if extreme else cases.ordinary(i, shape)
            params[name] = jnp.asarray(x.astype(dtype))
        state = init(params)
        parts = learned_parts(state)
        moved = jax.tree.map(lambda x: x * jnp.exp(steady(5, *x.shape)), parts)
        state = update(replace_learned(state, moved), params)
        view, small = apply(params, state), compress(params, state)
        assert_same_bits(materialize(small), view)
        for name, w in params.items():
            assert isinstance(small[name], jc.QuantizedArray)
            assert np.isfinite(np.asarray(view[name], np.float32)).all(), name
            assert not np.any(np.asarray(view[name])[np.asarray(w) == 0]), name
    some = {name: params[name] for name in ("channel", "ternary")}
    c = jc.lsq("int4")
    state = c.init(some)
    view = jax.jit(c.apply)(some, state)
    assert_same_bits(c.apply(some, state), view, "outside of jit")
    assert_same_bits(jc.materialize(c.compress(some, state)), view, "outside of jit")


def test_first_steps():
    w = jnp.array([[1.0, 0, 4], [3, 0, 0], [2, 0, -8]])
    channel = jc.lsq("int4").init({"w": w}).learned["w"]["scale"]
    # Over the entries that are not 0; a channel of zeros has no scale of its own.
    np.testing.assert_allclose(channel, [[4 / 7**0.5, 1, 12 / 7**0.5]], rtol=1e-6)
    tensor = jc.lsq("int4", per="tensor").init({"w": w}).learned["w"]["scale"]
    np.testing.assert_allclose(tensor, [[2 * 18 / 5 / 7**0.5]], rtol=1e-6)
    init = jc.lsq("int3", group_size=16).init
    params = {"w": steady(0, 64, 8)}
    assert_same_bits(jax.jit(init)(params), init(params))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_steps_stay_positive_and_finite(bad):
    params = {"w": steady(0, 8, 4)}
    c = jc.lsq("int4")
    tx = jc.compressed_training(optax.sgd(0.1), c, learned=_jump(bad))
    first = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), first, params)
    step, start = (s.compression.learned["w"]["scale"] for s in (state, first))
    ratio = {-1.0: 1 / REACH, math.inf: REACH}.get(bad, 1.0)
    np.testing.assert_array_equal(step, start * ratio)


def _jump(to):
    """An optimizer that brings everything to one value."""
    update = lambda grads, state, params: (jax.tree.map(lambda p: to - p, params), state)
    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.slow
def test_training_inside_wrappers():
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4", where="b/w"),
        jc.lsq("int3", where="**/w"),
    )
    tx = jc.compressed_training(optax.adam(1e-2), c, learned=optax.adam(1e-3))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(tx, 2))
    tx = optax.apply_if_finite(tx, 3)
    params, x = mlp_params(), steady(9, 64, 8)
    first = tx.init(params)
    params, state, losses = train(c, tx, first, params, x, mlp(mlp_params(7), x))
    assert losses[-1] < 0.7 * losses[0], losses[::13]
    view, small = jax.jit(c.view)(params, state), jc.compress(params, c, state=state)
    assert_same_bits(jc.materialize(small), view)
    assert float(jnp.mean(view["b"]["w"] == 0)) >= 0.5
    np.testing.assert_allclose(jax.jit(jc.lift(mlp))(small, x), mlp(view, x), atol=1e-5)
    (before,), (after,) = training_states(first), training_states(state)
    before, after = (s.compression.states[1].learned for s in (before, after))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)))


def test_stacks_and_vmap():
    """Each entry of a scanned stack has steps of its own, equal to those of its own parameter."""
    w = steady(1, 3, 8, 8) * jnp.array([1.0, 10, 0.1])[:, None, None]

    def deep(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = steady(2, 4, 8)
    uses = jc.uses(deep, {"w": w}, x)
    c = jc.lsq("int4")
    init, apply = jax.jit(c.init), jax.jit(c.apply)
    state = c.init({"w": w}, uses=uses)
    assert state.learned["w"]["scale"].shape == (3, 1, 8)
    states = [init({"w": each}) for each in w]
    alone = [apply({"w": each}, s)["w"] for each, s in zip(w, states, strict=True)]
    view = apply({"w": w}, state)
    np.testing.assert_array_equal(view["w"], jnp.stack(alone))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *states)
    np.testing.assert_array_equal(jax.vmap(apply)({"w": w}, stacked)["w"], view["w"])
    small = c.compress({"w": w}, state)
    assert_same_bits(jc.materialize(small), view)
    np.testing.assert_allclose(jax.jit(jc.lift(deep))(small, x), deep(view, x), atol=1e-5)
    grads = jax.grad(lambda p, s: deep(c.apply(p, s), x).sum(), 1, allow_int=True)
    per_layer = jax.jit(grads)({"w": w}, state).learned["w"]["scale"]
    assert np.abs(per_layer).sum((1, 2)).all()
    whole = jc.lsq("int4", per="tensor").init({"w": w}, uses=uses)
    assert whole.learned["w"]["scale"].shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jc.lsq("nf4"), "integers"),
        (lambda: jc.lsq("int1"), "positive code"),
        (lambda: jc.lsq("int4", per="row"), "per="),
        (lambda: jc.lsq("int4", 4, per="tensor"), "without groups"),
        (
            lambda: jc.lsq("int4", activations=jc.activations("int4", offset=True)),
            "offset=True goes",
        ),
        (
            lambda: jc.lsq("int4", activations=jc.activations("float8_e4m3fn", "learned")),
            "integers",
        ),
        (lambda: jc.lsq("int4", 3).init({"w": jnp.ones((8, 2))}), "does not divide"),
        (lambda: jc.lsq("uint4").init({"w": -jnp.ones((8, 2))}), "negative"),
        (
            lambda: jc.lsq("int4", activations=jc.activations("int4", "learned")).init(
                {"w": jnp.ones((8, 2))}
            ),
            "statistics",
        ),
        (lambda: jc.chain(jc.lsq("int4"), jc.quantize("int4")).init({"w": X}), "second grid"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_states_keep_their_types():
    c = jc.lsq("int4")
    params, traced = {"w": steady(0, 8, 4)}, []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params):
        traced.append(1)
        return c.update(state, params)

    state = jax.jit(c.init)(params)
    for _ in range(3):
        state = step(state, params)
    assert len(traced) == 1
