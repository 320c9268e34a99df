import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jaxopt_compress as jc
from tests.transforms.trees import TREES, Y, as_dict, weights

PRUNE = jc.prune(jc.scores.magnitude(), jc.schedules.polynomial(0.5, begin=0, end=4, every=2))
COMPRESSIONS = {
    "prune": PRUNE,
    "2:4 int8": jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4"),
        jc.quantize("int8"),
    ),
    "int8": jc.quantize("int8"),
    "prune int4": jc.chain(PRUNE, jc.quantize("int4", symmetric=False)),
    "low rank": jc.low_rank(rank=2),
    "low rank int8": jc.chain(jc.low_rank(rank=2), jc.quantize("int8")),
}
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
}


def halves(a, b):
    """Two optimizers in two groups: the kernel of the first layer, and everything else."""
    labels = {"first": {"kernel": "a"}, "last": {"kernel": "b"}, "bias": "b"}
    return optax.multi_transform({"a": a, "b": b}, labels)


def masked(tx):
    """Through the compression for the kernels only."""
    kernels = {"first": {"kernel": True}, "last": {"kernel": True}, "bias": False}
    others = jax.tree.map(lambda x: not x, kernels)
    return optax.chain(optax.masked(tx, kernels), optax.masked(optax.sgd(0.1), others))


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx, optax.scale(0.5)),
    "inject_hyperparams": lambda tx: optax.chain(
        optax.inject_hyperparams(optax.scale)(step_size=0.5), tx
    ),
    "masked": masked,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "multi_transform": lambda tx: halves(tx, optax.sgd(0.1)),
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=1)),
}


def make_step(tx, c, predict):
    """``step(params, opt_state) -> params, opt_state, loss``, compiled."""

    def loss(view):
        return jnp.mean((predict(view) - Y) ** 2)

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def train(tx, c, params, predict, steps=4):
    tx = optax.with_extra_args_support(tx)
    step, opt_state, losses = make_step(tx, c, predict), tx.init(params), []
    for _ in range(steps):
        params, opt_state, value = step(params, opt_state)
        losses.append(float(value))
    assert step._cache_size() == 1
    return params, opt_state, losses


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def assert_stored(c, params, opt_state):
    """What `compress` stores is what the trained function used."""
    small = jc.materialize(jc.compress(params, c, state=opt_state))
    assert_same(small, c.view(params, opt_state))
    assert_same(small, jax.jit(c.view)(params, opt_state))


@pytest.mark.fast("2:4 int8-lion", "low rank-adafactor")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["2:4 int8", "low rank"])
def test_optimizers(name, method):
    c = COMPRESSIONS[method]
    params, predict = as_dict()
    params, opt_state, losses = train(
        jc.compressed_training(OPTIMIZERS[name], c), c, params, predict, steps=8
    )
    assert losses[-1] < losses[0]
    assert_stored(c, params, opt_state)


@pytest.mark.fast("2:4 int8-dict", "2:4 int8-nnx", "low rank-holes", "low rank-equinox")
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("method", ["2:4 int8", "low rank"])
def test_trees(tree, method):
    params, predict = TREES[tree]()
    if tree == "equinox":
        # Optimizers of optax move floats only; the integer is split off as with any equinox module.
        params, rest = eqx.partition(params, eqx.is_inexact_array)
        predict = lambda p, predict=predict: predict(eqx.combine(p, rest))
    c = COMPRESSIONS[method]
    params, opt_state, losses = train(
        jc.compressed_training(optax.adam(1e-2), c), c, params, predict, steps=6
    )
    assert losses[-1] < losses[2]
    assert_stored(c, params, opt_state)


def test_integer_leaves_stay():
    c = jc.quantize("int8")
    params = {"first": weights()[0], "steps": jnp.arange(3), "flag": jnp.array(True)}
    tx = jc.compressed_training(optax.adamw(0.1, weight_decay=9.0), c)
    opt_state = tx.init(params)
    loss = lambda p: jnp.sum(p["first"] ** 2) * p["steps"][2]
    # The derivative of an integer has the dtype float0, which optimizers do not take.
    grads = jax.grad(loss, allow_int=True)(c.view(params, opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    new = optax.apply_updates(params, updates)
    assert_same([new["steps"], new["flag"]], [params["steps"], params["flag"]])
    assert new["steps"].dtype == params["steps"].dtype and bool(jnp.all(updates["first"] != 0))


@pytest.mark.fast(
    "2:4 int8-masked",
    "2:4 int8-apply_if_finite",
    "low rank int8-MultiSteps",
    "low rank int8-multi_transform",
)
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("method", ["2:4 int8", "low rank int8"])
def test_wrappers(name, method):
    c = COMPRESSIONS[method]
    tx = WRAPPERS[name](jc.compressed_training(optax.adam(2e-2), c))
    params, predict = as_dict()
    trained, opt_state, losses = train(tx, c, params, predict, steps=6)
    # Until masks settle the function itself changes.
    assert losses[-1] < losses[3]
    assert_stored(c, trained, opt_state)
    first = c.view(trained, opt_state)["first"]["kernel"]
    if method == "2:4 int8":
        assert int(jnp.max(jnp.sum(first.reshape(2, 4, 8) != 0, 1))) <= 2
    else:
        assert np.linalg.matrix_rank(first, tol=0.1 * np.linalg.norm(first, 2)) <= 2


def test_schedules_count_updates_under_multi_steps():
    c = jc.prune(
        jc.scores.magnitude(), jc.schedules.polynomial(0.5, begin=0, end=4), where="first/*"
    )
    tx = optax.MultiSteps(jc.compressed_training(optax.adam(1e-2), c), 2)
    params, predict = as_dict()
    # One micro-step more does not count; three updates ask for 31.5 of 64, and halves round up.
    trained, opt_state, _ = train(tx, c, params, predict, steps=7)
    assert int(jnp.sum(c.view(trained, opt_state)["first"]["kernel"] == 0)) == 32


def test_accumulation_inside_is_refused():
    params, _ = as_dict()
    inner = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
    for wrong in (inner, optax.chain(optax.clip(1.0), inner)):
        tx = jc.compressed_training(wrong, jc.quantize("int8"))
        with pytest.raises(ValueError, match=r"use optax\.MultiSteps"):
            tx.init(params)
    tx = jc.compressed_training(optax.sgd(0.1), jc.quantize("int8"))
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params, tx.init(params))
    for method in (jc.quantize("int8").apply, jc.quantize("int8").compress):
        with pytest.raises(ValueError, match="the state of an optimizer, which view"):
            method(params, tx.init(params))
    with pytest.raises(ValueError, match="holds no compression"):
        jc.quantize("int8").view(params, optax.sgd(0.1).init(params))


@pytest.mark.parametrize("name", ["int8", "low rank int8"])
def test_the_view_of_a_state_without_an_optimizer(name):
    """Such as that of averaged parameters."""
    params, c = as_dict()[0], COMPRESSIONS[name]
    tx = jc.compressed_training(optax.sgd(0.1), c)
    assert_same(c.view(params, c.init(params)), c.view(params, tx.init(params)))


def test_hyperparameters_may_be_injected():
    c = COMPRESSIONS["int8"]
    make = lambda learning_rate: jc.compressed_training(optax.adam(learning_rate), c)
    params, predict = as_dict()
    injected = train(optax.inject_hyperparams(make)(learning_rate=1e-2), c, params, predict)
    plain = train(make(1e-2), c, params, predict)
    assert_stored(c, *injected[:2])
    # The rate is an array in one program and a constant in the other.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), injected[0], plain[0])


def test_two_compressions_in_two_groups():
    prune, low_rank = COMPRESSIONS["prune"], COMPRESSIONS["low rank int8"]
    tx = halves(
        jc.compressed_training(optax.adam(1e-2), prune),
        jc.compressed_training(optax.lion(1e-3), low_rank),
    )
    params, predict = as_dict()
    params, opt_state, _ = train(tx, prune, params, predict, steps=5)
    assert_same(prune.view(params, opt_state), low_rank.view(params, opt_state))
    view = prune.view(params, opt_state)
    assert int(jnp.sum(view["first"]["kernel"] == 0)) == 32
    assert not bool(jnp.any(view["last"]["kernel"] == 0))
    for c in (prune, low_rank):
        assert_stored(c, params, opt_state)


@pytest.mark.fast("2:4 int8", "prune int4", "low rank int8")
@pytest.mark.parametrize("method", COMPRESSIONS)
def test_gradients_are_the_direct_ones(method):
    c = COMPRESSIONS[method]
    params, predict = as_dict()
    loss = lambda view: jnp.mean((predict(view) - Y) ** 2)
    # An inner optimizer that hands on what it gets shows the gradients.
    tx = jc.compressed_training(optax.identity(), c, learned=optax.scale(1.0))
    opt_state = tx.init(params)
    state = opt_state.compression

    @jax.jit
    def pulled(params, opt_state):
        return tx.update(jax.grad(loss)(c.view(params, opt_state)), opt_state, params)

    @jax.jit
    def direct(params, learned):
        put = jax.tree_util.Partial(set_learned, state)
        return jax.grad(lambda p, parts: loss(c.apply(p, put(parts))), (0, 1))(params, learned)

    updates, new = pulled(params, opt_state)
    parts = get_learned(state)
    grads, part_grads = direct(params, parts)
    assert_same(updates, grads)
    assert_same(get_learned(new.compression), jax.tree.map(jnp.add, parts, part_grads))
    if method.startswith("low rank"):
        assert all(bool(jnp.any(g)) for g in jax.tree.leaves(part_grads))
        assert not any(bool(jnp.any(updates[k]["kernel"])) for k in ("first", "last"))


def get_learned(state):
    return [s.learned for s in getattr(state, "states", (state,))]


def set_learned(state, parts):
    if not hasattr(state, "states"):
        return state._replace(learned=parts[0])
    states = zip(state.states, parts, strict=True)
    return state._replace(states=tuple(s._replace(learned=p) for s, p in states))


def test_factors_learn_and_the_dense_parameter_rests():
    c = jc.low_rank(rank=2)
    params, predict = as_dict()
    tx = jc.compressed_training(optax.adamw(1e-2, weight_decay=0.5), c)
    before = c.view(params, tx.init(params))
    trained, opt_state, _ = train(tx, c, params, predict)
    after = c.view(trained, opt_state)
    for layer in ("first", "last"):
        assert_same(trained[layer], params[layer])
        assert bool(jnp.any(before[layer]["kernel"] != after[layer]["kernel"]))
    assert bool(jnp.any(trained["bias"] != params["bias"]))
