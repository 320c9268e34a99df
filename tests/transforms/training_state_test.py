"""Where the state of training lives: on many devices, in checkpoints, in other dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc

PRUNE = jc.prune(jc.scores.magnitude(), jc.schedules.polynomial(0.75, begin=0, end=3))
METHODS = {
    "2:4 int8": jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4"),
        jc.quantize("int8"),
    ),
    "prune int8": jc.chain(PRUNE, jc.quantize("int8", group_size=8)),
    "low rank": jc.low_rank(rank=2),
}


def make(c, optimizer=None):
    """A transformation and an uncompiled step for one kernel and one bias."""
    tx = jc.compressed_training(optimizer or optax.adam(1e-2), c)

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["kernel"]) + params["bias"] - 0.1) ** 2)

    def step(params, opt_state, x, reduce=lambda grads: grads):
        grads = reduce(jax.grad(loss)(c.view(params, opt_state), x))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return tx, step


def inputs(rows=64, columns=32, batch=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    kernel = jax.random.normal(keys[0], (rows, columns), dtype)
    params = {"kernel": kernel, "bias": jnp.zeros(columns, dtype)}
    return params, jax.random.normal(keys[1], (batch, rows), dtype) / 8


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["prune int8", "low rank"])
def test_restored_state_continues_bit_for_bit(name, tmp_path):
    c = METHODS[name]
    tx, step = make(c)
    params, x = inputs()
    step, state = jax.jit(step), (params, tx.init(params))
    for _ in range(2):
        state = step(*state, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        # The template of a fresh process: the shapes alone.
        template = jax.eval_shape(lambda params: (params, tx.init(params)), params)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(place, template))
    assert_same(restored, state)
    for _ in range(3):
        state, restored = step(*state, x), step(*restored, x)
    assert_same(restored, state)
    small = [jc.compress(params, c, state=opt_state) for params, opt_state in (state, restored)]
    assert_same(*small)


@pytest.mark.ci
@pytest.mark.fast("AxisType.Auto")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_masks_stay_where_the_parameters_are(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"kernel": P("x", "y"), "bias": P("y")}
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    params, _ = inputs(256, 128)
    tx, _ = make(PRUNE, optax.sgd(0.1))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings)
        opt_state = jax.jit(tx.init)(spread)
        assert opt_state.compression.leaves["kernel"].mask.sharding.spec == P("x", "y")
        update = jax.jit(tx.update)
        for _ in range(2):
            # The same gradients as on one device, to compare bits: sums are in another order.
            grads = jax.device_put(jax.tree.map(jnp.cos, params), shardings)
            updates, opt_state = update(grads, opt_state, spread)
            mask = opt_state.compression.leaves["kernel"].mask
            assert mask.sharding.is_equivalent_to(shardings["kernel"], 2)
            assert updates["kernel"].sharding.is_equivalent_to(shardings["kernel"], 2)
        compiled = update.lower(grads, opt_state, spread).compile()
        assert_small_collectives(compiled.as_text())
        view = jax.jit(PRUNE.view)(spread, opt_state)
        assert view["kernel"].sharding.is_equivalent_to(shardings["kernel"], 2)
    opt_state = tx.init(params)
    for _ in range(2):
        expected, opt_state = tx.update(jax.tree.map(jnp.cos, params), opt_state, params)
    assert_same(jax.device_get(updates), jax.device_get(expected))
    assert_same(jax.device_get(mask), jax.device_get(opt_state.compression.leaves["kernel"].mask))


def assert_small_collectives(hlo, limit=16):
    """What devices tell each other is counts: no result of more than ``limit`` entries."""
    pattern = r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
    found = re.findall(pattern, hlo)
    assert found
    for shapes in found:
        for dims in re.findall(r"\[([\d,]*)\]", shapes):
            assert np.prod([int(d) for d in dims.split(",") if d], initial=1) <= limit, shapes


@pytest.mark.ci
def test_pmap():
    c = METHODS["2:4 int8"]
    tx, step = make(c)
    params, x = inputs()
    mean = lambda grads: jax.lax.pmean(grads, "devices")
    mapped = jax.pmap(lambda p, s, x: step(p, s, x, mean), axis_name="devices")
    many = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * 8), tree)
    state = (many(params), many(tx.init(params)))
    for _ in range(2):
        state = mapped(*state, x.reshape(8, 2, -1))
    first, last = (jax.tree.map(lambda a, i=i: a[i], state) for i in (0, 7))
    assert_same(first, last)
    assert int(jnp.sum(c.view(*first)["kernel"] == 0)) >= 64 * 32 // 2


@pytest.mark.ci
@pytest.mark.fast("2:4 int8-bfloat16", "low rank-float16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["2:4 int8", "low rank"])
def test_gradients_in_another_dtype(dtype, name):
    c = METHODS[name]
    tx, _ = make(c)
    for params, grad_dtype in ((inputs()[0], dtype), (inputs(dtype=dtype)[0], jnp.float32)):
        opt_state = tx.init(params)
        grads = jax.tree.map(lambda p, d=grad_dtype: jnp.ones(p.shape, d), params)
        updates, new = jax.jit(tx.update)(grads, opt_state, params)
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert shapes(new.compression) == shapes(opt_state.compression)
        moved = optax.apply_updates(params, updates)
        assert shapes(moved) == shapes(params)
        assert shapes(c.view(moved, new)) == shapes(params)


@pytest.mark.ci
def test_nnx_optimizer():
    c = jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4"),
        jc.quantize("int8"),
    )
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    tx = jc.compressed_training(optax.adam(1e-2), c)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (4, 8))

    @nnx.jit
    def step(model, optimizer):
        graph, params = nnx.split(model)
        loss = lambda view: jnp.mean((nnx.merge(graph, view)(x) - x) ** 2)
        value, grads = jax.value_and_grad(loss)(c.view(params, nnx.as_pure(optimizer.opt_state)))
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    params, opt_state = nnx.state(model), nnx.as_pure(optimizer.opt_state)
    small = jc.materialize(jc.compress(params, c, state=opt_state))
    assert_same(nnx.as_pure(small), nnx.as_pure(c.view(params, opt_state)))
    assert int(jnp.sum(nnx.as_pure(small)["kernel"] == 0)) >= 32
