"""Gradients averaged in fewer bytes: what was sent and what is kept add up to what there was."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.quantization.cases import normal

DEVICES, STEPS = 4, 3
METHODS = {
    "int8": "int8",
    "int4": jc.blockwise("int4", block=64),
    "float8": jc.blockwise("float8_e4m3fn"),
    "nf4": jc.blockwise("nf4", block=64),
    "int3": jc.blockwise("int3", block=64),
    "power_sgd": jc.power_sgd(rank=2),
    "top_k": jc.top_k(0.05),
}
SLOW, CI = ("int4", "float8", "nf4", "int3"), ("int8", "power_sgd")
MARKS = dict.fromkeys(SLOW, pytest.mark.slow) | dict.fromkeys(CI, pytest.mark.ci)
KINDS = [pytest.param(name, marks=MARKS.get(name, [])) for name in METHODS]
SHAPES = {"stack": (3, 40, 24), "odd": (37, 19), "bias": (24,)}


@functools.cache
def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def gradients(shapes=None, steps=STEPS):
    """`[steps, devices, *shape]`, layers of a stack a thousand times larger than those before."""
    found = {}
    for i, (path, shape) in enumerate((shapes or SHAPES).items()):
        x = normal(steps, DEVICES, *shape, seed=i)
        layers = 10.0 ** (3 * np.arange(shape[0])) if len(shape) == 3 else np.ones(1)
        found[path] = (x * layers.reshape(-1, *(1,) * (len(shape) - 1))).astype(np.float32)
    return found


def reduced(method, **given):
    given = {"devices": DEVICES, "min_size": 512, **given}
    return jc.reduced_gradients(method, "data", **given)


def sharded(tx, state, check_vma=True):
    """``(grads [devices, ...], state) -> (averages [devices, ...], state)``."""
    specs = jc.reduced_specs(state, "data")

    def step(grads, state):
        updates, state = tx.update(jax.tree.map(lambda g: g[0], grads), state)
        return jax.tree.map(lambda u: u[None], updates), state

    placed = {"in_specs": (P("data"), specs), "out_specs": (P("data"), specs)}
    return jax.jit(jax.shard_map(step, mesh=mesh(), check_vma=check_vma, **placed))


@pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
@pytest.mark.parametrize("name", KINDS)
def test_sent_and_kept_add_up(name):
    grads = gradients()
    tx = reduced(METHODS[name])
    state = tx.init(jax.tree.map(lambda g: jnp.asarray(g[0, 0]), grads))
    assert set(state.residual) == {"stack", "odd"}
    step, sent = sharded(tx, state), []
    for t in range(STEPS):
        averages, state = step(jax.tree.map(lambda g, t=t: g[t], grads), state)
        sent.append(jax.tree.map(np.asarray, averages))
    for path, g in grads.items():
        total = sum(np.asarray(x[path], np.float64) for x in sent)
        # On all devices alike, bit for bit.
        assert all(np.array_equal(x[path][0], x[path][i]) for x in sent for i in range(DEVICES))
        kept = np.asarray(state.residual[path], np.float64).mean(0) if path != "bias" else 0
        want = g.astype(np.float64).mean(1).sum(0)
        # Some roundings of float32 per step, of numbers of the size of a layer's largest sum.
        axes = tuple(range(1, want.ndim)) if want.ndim == 3 else None
        size = np.abs(g).max((0, 1)).max(axes, keepdims=True) * DEVICES * STEPS
        assert np.all(np.abs(total[0] + kept - want) <= 2.0**-20 * size), path


@pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")
@pytest.mark.ci
@pytest.mark.fast("int8")
@pytest.mark.parametrize("name", ["int8", "power_sgd"])
def test_layers_of_a_stack_are_apart(name):
    """Each is averaged as if it were alone, whatever the size of the others."""
    grads = gradients({"stack": (3, 40, 24)}, steps=1)
    tx = reduced(METHODS[name])
    averages = {}
    for layers in (slice(0, 3), slice(0, 1)):
        part = {"stack": jnp.asarray(grads["stack"][0][:, layers])}
        state = tx.init({"stack": part["stack"][0]})
        # The same start of the first layer.
        if name == "power_sgd":
            q = jnp.broadcast_to(normal(24, 2, seed=9), state.shared["stack"].shape)
            state = state._replace(shared={"stack": q})
        averages[layers.stop] = sharded(tx, state)(part, state)[0]["stack"]
    want, got = averages[1][0, 0], averages[3][0, 0]
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-20 * np.abs(want).max())


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all)(?:-start)?\(")


def wire(compiled):
    """`dtype opcode` -> entries, of what collectives of a compiled program produce."""
    found = {}
    for types, opcode in COLLECTIVE.findall(compiled.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types):
            key = f"{dtype} {opcode}"
            found[key] = found.get(key, 0) + int(np.prod([int(d) for d in dims.split(",") if d]))
    return found


K, N = 96, 64
SENT = {
    # Blocks of 256: 24 of them, 6 per device.
    "int8": {"s8 all-to-all": K * N, "s8 all-gather": K * N},
    "int4": {"u8 all-to-all": K * N // 2, "u8 all-gather": K * N // 2},
    "power_sgd": {"f32 all-reduce": 2 * (K + N)},
    "top_k": {"f32 all-gather": DEVICES * 308, "s32 all-gather": DEVICES * 308},
}
SCALES = {"int8": K * N // 256, "int4": K * N // 64}


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[] if k == "int8" else pytest.mark.ci) for k in SENT]
)
def test_collectives_carry_what_is_promised(name):
    params = {"w": jnp.zeros((K, N))}
    tx = reduced(METHODS[name])
    state = tx.init(params)
    found = wire(sharded(tx, state).lower({"w": jnp.zeros((DEVICES, K, N))}, state).compile())
    scales = dict.fromkeys(("f32 all-to-all", "f32 all-gather"), SCALES.get(name, 0))
    assert found == SENT[name] | {k: v for k, v in scales.items() if v}


@pytest.mark.ci
def test_warm_factors_find_a_low_rank_gradient():
    """A power iteration from any start: exact where the rank suffices."""
    a, b = normal(DEVICES, 64, 2), normal(40, 2, seed=1)
    grads = {"w": jnp.asarray(a @ b.T)}
    tx = reduced(jc.power_sgd(rank=2))
    state = tx.init({"w": grads["w"][0]})
    step = sharded(tx, state)
    zeros, state = step({"w": jnp.zeros_like(grads["w"])}, state)
    assert not np.any(zeros["w"])
    # From factors of nothing, in which only columns of the identity are left.
    _, state = step(grads, state)
    state = state._replace(residual=jax.tree.map(jnp.zeros_like, state.residual))
    averages, _ = step(grads, state)
    want = np.asarray(grads["w"]).mean(0)
    np.testing.assert_allclose(averages["w"][0], want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.ci
def test_what_is_not_finite_is_seen_and_not_kept():
    tx = reduced("int8")
    params = {"w": jnp.zeros((K, N)), "v": jnp.ones((K, N))}
    state = tx.init(params)
    step = sharded(tx, state)
    grads = jax.tree.map(jnp.asarray, gradients({"w": (K, N), "v": (K, N)}, 1))
    grads = jax.tree.map(lambda g: g[0], grads)
    _, state = step(grads, state)
    averages, after = step(grads | {"w": grads["w"].at[1, 3, 5].set(jnp.inf)}, state)
    assert not np.all(np.isfinite(averages["w"]))
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.ci
@pytest.mark.parametrize("how", ["unchecked", "pmap"])
def test_other_ways_to_map_find_the_same(how):
    grads = {"w": jnp.asarray(gradients({"w": (K, N)}, 1)["w"][0])}
    tx = reduced("int8")
    state = tx.init({"w": grads["w"][0]})
    want, kept = sharded(tx, state)(grads, state)
    if how == "unchecked":
        got, left = sharded(tx, state, check_vma=False)(grads, state)
    else:
        inner = jax.pmap(tx.init, "data", devices=jax.devices()[:DEVICES])
        state = inner({"w": grads["w"]})
        got, left = jax.pmap(tx.update, "data", devices=jax.devices()[:DEVICES])(grads, state)
        left = jax.tree.map(lambda x: x[:, 0], left)
    np.testing.assert_array_equal(got["w"], want["w"])
    np.testing.assert_array_equal(left.residual["w"], kept.residual["w"])


def test_wrong_calls():
    params = {"w": jnp.zeros((K, N))}
    tx = reduced("int8")
    state = tx.init(params)
    specs = jc.reduced_specs(state, "data")
    loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
    x = jnp.ones((DEVICES, K))

    def step(params, state, x):
        return tx.update(jax.grad(loss)(params, x), state)

    placed = {"in_specs": (P(), specs, P("data")), "out_specs": (P(), specs)}
    with pytest.raises(ValueError, match=r"'w' is the same on all devices of 'data'.*pcast"):
        jax.shard_map(step, mesh=mesh(), **placed)(params, state, x)
    axes = ("data", "fsdp")
    wide = jc.reduced_gradients("int8", axes, devices=DEVICES, min_size=512)

    def half(params, state, x):
        # Along one of two axes only: along the other JAX has summed.
        params = jax.lax.pcast(params, "data", to="varying")
        return wide.update(jax.grad(loss)(params, x), state)[0]

    two = jax.make_mesh((2, DEVICES // 2), axes, axis_types=(AxisType.Auto,) * 2)
    wide_state = wide.init(params)
    wide_specs = (P(), jc.reduced_specs(wide_state, axes), P(axes))
    with pytest.raises(ValueError, match="summed already"):
        jax.shard_map(half, mesh=two, in_specs=wide_specs, out_specs=P())(params, wide_state, x)
    with pytest.raises(ValueError, match=r"residual of 'w' has shape \(4, 96, 64\)"):
        jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=P())(
            params, state, x
        )
    with pytest.raises(ValueError, match="pass devices=, set a mesh"):
        jc.reduced_gradients("int8", "data", min_size=1).init(params)
    with pytest.raises(ValueError, match=r"power_sgd\(rank=64\) takes none of w \(96, 64\)"):
        reduced(jc.power_sgd(rank=64)).init(params)
    with pytest.raises(ValueError, match="up to 8 bits"):
        reduced("int16")
    for bad in (lambda: jc.top_k(0.0), lambda: jc.power_sgd(0), lambda: jc.blockwise(block=0)):
        with pytest.raises(ValueError):
            bad()
    with jax.set_mesh(mesh()):
        assert jc.reduced_gradients("int8", "data").init(params).residual["w"].shape[0] == DEVICES


@pytest.mark.ci
@pytest.mark.fast("power_sgd")
@pytest.mark.parametrize("name", ["int8", "power_sgd", "top_k"])
def test_reaches_what_plain_averages_reach(name):
    """Linear regression, whose solution is known: error feedback gets there."""
    x, w = normal(DEVICES * 32, 48), normal(48, 32, seed=1)
    data = jnp.asarray(x), jnp.asarray(x @ w)
    # What is sent late acts like momentum: the rate has to leave room for some twenty steps.
    tx = optax.chain(reduced(METHODS[name]), optax.sgd(0.02))
    params = {"w": jnp.zeros((48, 32))}
    specs = P(), jc.reduced_specs(tx.init(params), "data")

    def train(params, state, x, y):
        def step(now, _):
            params, state = now
            own = jax.lax.pcast(params, "data", to="varying")
            grads = jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2) * 16)(own)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=2000)[0]

    placed = {"in_specs": (*specs, P("data"), P("data")), "out_specs": specs}
    train = jax.jit(jax.shard_map(train, mesh=mesh(), **placed))
    params, _ = train(params, tx.init(params), *data)
    # Rounding stops nearer than that; without feedback top_k of 5% would not come near.
    assert np.abs(np.asarray(params["w"]) - w).max() < 0.01
