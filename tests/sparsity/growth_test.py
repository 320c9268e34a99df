"""Masks that change while training: what grows, what goes, and what rests at 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_compress as jc
from jaxopt_compress.compression.states import compression_states
from tests.transforms.trees import TREES, Y, as_dict

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")

HALF = jc.schedules.constant(0.5, every=2)
GROW = {
    "gradient": jc.grow.by_gradient(0.3),
    "momentum": jc.grow.by_momentum(optax.cosine_decay_schedule(0.5, 100)),
    "random": jc.grow.random(jax.random.key(0), 0.3),
}
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}
WRAPPERS = {
    "plain": lambda tx: tx,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "b": optax.sgd(0.1)},
        {"first": {"kernel": "a"}, "last": {"kernel": "b"}, "bias": "b"},
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "clipped": lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
}


def grown(rule, schedule=HALF, where=None, **kwargs):
    return jc.prune(jc.scores.magnitude(), schedule, grow=GROW[rule], where=where, **kwargs)


def states_of(state):
    return compression_states(state)[0].leaves


def check_training(tx, c, params, predict, steps=6):
    """Trains; masks keep their counts, change, and what they prune is 0 in the parameters."""

    @jax.jit
    def step(params, opt_state):
        loss = lambda view: jnp.mean((predict(view) - Y) ** 2)
        value, grads = jax.value_and_grad(loss)(c.view(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = tx.init(params), []
    first = states_of(opt_state)
    for _ in range(steps):
        params, opt_state, value = step(params, opt_state)
        losses.append(float(value))
    assert step._cache_size() == 1 and np.isfinite(losses).all()
    last = states_of(opt_state)
    for path, state in last.items():
        assert int(jnp.sum(state.mask)) == int(jnp.sum(first[path].mask)), path
        assert bool(jnp.any(state.mask != first[path].mask)), path
    small = jc.materialize(jc.compress(params, c, state=opt_state))
    jax.tree.map(np.testing.assert_array_equal, small, c.view(params, opt_state))
    # The view hides nothing: parameters themselves are sparse.
    jax.tree.map(np.testing.assert_array_equal, small, params)
    return params, opt_state


@pytest.mark.fast("gradient-adafactor")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", GROW)
def test_growth_in_any_optimizer(rule, optimizer):
    c = grown(rule)
    params, predict = as_dict()
    check_training(jc.compressed_training(OPTIMIZERS[optimizer], c), c, params, predict)


@pytest.mark.fast("random-MultiSteps")
@pytest.mark.parametrize("wrapper", list(WRAPPERS)[1:])
@pytest.mark.parametrize("rule", GROW)
def test_growth_in_any_wrapper(rule, wrapper):
    """Of the first kernel alone: other leaves are not there for some of the wrappers."""
    c = grown(rule, where="first/kernel")
    params, predict = as_dict()
    tx = WRAPPERS[wrapper](jc.compressed_training(optax.adam(1e-2), c))
    check_training(tx, c, params, predict, steps=9)


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["tuple", "holes", "nnx"])
@pytest.mark.parametrize("rule", ["gradient", "random"])
def test_growth_in_any_tree(rule, tree):
    params, predict = TREES[tree]()
    c = grown(rule)
    check_training(jc.compressed_training(optax.adam(1e-2), c), c, params, predict)


def test_rigl_by_hand():
    """Kept: 4 and 3. One of two goes, and the largest gradient of the others comes, at 0."""
    once = jc.schedules.constant(0.5, every=1, end=1)
    c = jc.prune(jc.scores.magnitude(), once, grow=jc.grow.by_gradient(0.5))
    tx = jc.compressed_training(optax.sgd(0.5, momentum=0.9), c)
    params = {"w": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    opt_state = tx.init(params)
    grads = {"w": jnp.array([[1.0], [9.0], [0.5], [2.0]])}
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    # The dropped entry has the largest gradient of all, and does not come back at once.
    np.testing.assert_array_equal(opt_state.compression.leaves["w"].mask[:, 0], [1, 0, 0, 1])
    np.testing.assert_array_equal(params["w"][:, 0], [3.5, 0, 0, 0])
    np.testing.assert_array_equal(opt_state.inner[0].trace["w"][:, 0], [1, 9, 0, 0])
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"][:, 0], [3.5 - 0.5 * 1.9, 0, 0, -1], rtol=1e-6)
    np.testing.assert_allclose(opt_state.inner[0].trace["w"][:, 0], [1.9, 0, 0, 2], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["leaf", "output", "global"])
def test_counts_stay_whatever_is_compared(scope):
    """Also of a gradual schedule, of stacks with scales of their own, and of ties at 0."""
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 100.0, 0.01])[:, None, None]
    params = {
        "stack": jnp.asarray(scales * rng.standard_normal((3, 8, 4)), jnp.float32),
        "ties": jnp.zeros((8, 2)),
    }
    schedule = jc.schedules.polynomial(0.75, begin=0, end=4, initial=0.25)
    c = jc.prune(
        jc.scores.magnitude(), schedule, scope=scope, grow=jc.grow.by_gradient(0.9), stack=0
    )
    state, update = c.init(params), jax.jit(c.update)
    for step in range(6):
        sparsity = float(schedule.sparsity(step))
        masks = {k: np.asarray(leaf.mask) for k, leaf in state.leaves.items()}
        if scope == "global":
            kept = sum(m.sum() for m in masks.values())
            assert kept == 112 - int(np.floor(112 * np.float32(sparsity) + 0.5))
        else:
            axes = -2 if scope == "output" else (-2, -1)
            for mask in masks.values():
                size = mask.sum(axes, keepdims=True).size
                size = mask.size // size
                want = size - int(np.floor(size * np.float32(sparsity) + 0.5))
                assert (mask.sum(axes) == want).all(), (step, mask.sum(axes), want)
        grads = jax.tree.map(
            lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32), params
        )
        state = update(state, params, grads=grads)


@pytest.mark.slow
def test_growth_needs_gradients():
    params = {"w": jnp.arange(8.0).reshape(4, 2)}
    c = grown("gradient")
    with pytest.raises(ValueError, match=r"no gradient of 'w' of shape \(4, 2\).*grads=grads"):
        c.update(c.init(params), params)
    tx = jc.compressed_training(optax.sgd(0.1), jc.chain(jc.low_rank(rank=1), c))
    with pytest.raises(ValueError, match=r"'w/u' is not a parameter but a learned factor"):
        tx.init(params)


@pytest.mark.slow
def test_growth_under_nnx_optimizer():
    c = grown("gradient")
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    tx = jc.compressed_training(optax.adam(1e-2), c)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (4, 8))

    @nnx.jit
    def step(model, optimizer):
        graph, params = nnx.split(model)
        loss = lambda view: jnp.mean((nnx.merge(graph, view)(x) - x) ** 2)
        view = c.view(params, nnx.as_pure(optimizer.opt_state))
        optimizer.update(model, jax.grad(loss)(view))

    for _ in range(6):
        step(model, optimizer)
    params, opt_state = nnx.as_pure(nnx.state(model)), nnx.as_pure(optimizer.opt_state)
    kernel, mask = params["kernel"], states_of(opt_state)["kernel"].mask
    assert int(jnp.sum(mask)) == 32
    np.testing.assert_array_equal(jnp.where(mask, 0, kernel), 0)
    np.testing.assert_array_equal(jnp.where(mask, 0, opt_state.inner[0].mu["kernel"]), 0)


@pytest.mark.slow
def test_members_of_an_ensemble_train_as_alone():
    """Initialized, updated and compressed under vmap, by a global threshold for each."""
    rng = np.random.default_rng(1)
    members = [
        {
            k: jnp.asarray(10.0**i * rng.standard_normal(s), jnp.float32)
            for k, s in (("a", (8, 6)), ("b", (6, 4)))
        }
        for i in range(2)
    ]
    c = jc.prune(
        jc.scores.magnitude(),
        jc.schedules.constant(0.5, every=1),
        scope="global",
        grow=jc.grow.by_gradient(0.5),
    )
    tx = jc.compressed_training(optax.adam(0.1), c)

    def run(params):
        opt_state = tx.init(params)
        for _ in range(2):
            updates, opt_state = tx.update(jax.tree.map(jnp.cos, params), opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state

    stack = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = jax.jit(jax.vmap(run))(stack)
    alone_in_time = jax.jit(run)
    for i, member in enumerate(members):
        want, got = alone_in_time(member), jax.tree.map(lambda x, i=i: x[i], together)
        masks = lambda run: {k: leaf.mask for k, leaf in states_of(run[1]).items()}
        jax.tree.map(np.testing.assert_array_equal, masks(got), masks(want))
        small = jc.compress(got[0], c, state=got[1])
        jax.tree.map(np.testing.assert_array_equal, jc.materialize(small), c.view(*got))


@pytest.mark.ci
def test_growth_within_groups_of_a_pattern():
    """Each group gives its weakest entry for the pruned one with the largest gradient."""
    w = jnp.array([4.0, 3.0, 0.5, 0.6, 9.0, 8.0, 0.7, 0.1])[:, None]
    grads = {"w": jnp.array([0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 5.0])[:, None]}
    c = jc.prune(
        jc.scores.magnitude(),
        jc.schedules.constant(0.5, every=2),
        "2:4",
        grow=jc.grow.by_gradient(0.5),
    )
    state = jax.jit(c.init)({"w": w})
    update = jax.jit(lambda state: c.update(state, {"w": w}, grads=grads))
    first = update(state)
    # Only every second step is due.
    np.testing.assert_array_equal(first.leaves["w"].mask[:, 0], [1, 1, 0, 0, 1, 1, 0, 0])
    second = update(first)
    np.testing.assert_array_equal(second.leaves["w"].mask[:, 0], [1, 0, 0, 1, 1, 0, 0, 1])
    small = jc.compress({"w": w}, c, state=second)["w"]
    assert small.pattern == (2, 4)
    np.testing.assert_array_equal(small.materialize(), c.apply({"w": w}, second)["w"])
