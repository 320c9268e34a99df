"""Methods that decide over all parameters, see gradients, learn and have penalties."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.arrays import MaskedArray
from jaxopt_compress.compression import (
    Decision,
    LeafMethod,
    LeafState,
    Method,
    Parameter,
    compression_of,
)
from jaxopt_compress.compression.states import learned_parts
from jaxopt_compress.tree import Layout


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Masked(LeafState):
    """Any mask, for what is tested here."""

    mask: Any
    kind = "masked"
    establishes = frozenset({"zeros"})
    keeps = frozenset({"zeros", "grid"})

    def apply(self, w, learned):
        return MaskedArray(jc.materialize(w), self.mask)

    def compress(self, w, learned, path):
        return jnp.where(self.mask, jc.materialize(w), 0)


def global_magnitude(share: float) -> jc.Compression:
    """One threshold for all parameters: what no method of single leaves can decide."""

    def decided(parameters):
        values = {k: jnp.abs(p.dense()) for k, p in parameters.items()}
        everything = jnp.concatenate([v.ravel() for v in values.values()])
        threshold = jnp.quantile(everything, share)
        return {k: Decision(Masked(v > threshold)) for k, v in values.items()}

    update = lambda decisions, count, parameters: decided(parameters)
    return compression_of(Method(lambda parameters: None, decided, update), None)


def test_a_method_may_decide_over_all_parameters():
    params = {"small": 0.1 * normal(0, 8, 4), "large": 10 * normal(1, 8, 4)}
    c = global_magnitude(0.5)
    state = c.init(params)
    view, small = c.apply(params, state), c.compress(params, state)
    zeros = {k: int(jnp.sum(v == 0)) for k, v in view.items()}
    assert zeros["small"] + zeros["large"] == 32 and zeros["small"] > 30
    jax.tree.map(np.testing.assert_array_equal, view, small)
    swapped = {"small": params["large"], "large": params["small"]}
    moved = jax.jit(c.update)(state, swapped)
    assert int(jnp.sum(c.apply(swapped, moved)["large"] == 0)) > 30
    chained = jc.chain(c, jc.quantize("int8"))
    view = chained.apply(params, chained.init(params))
    assert int(jnp.sum(view["small"] == 0)) >= zeros["small"]


@pytest.mark.parametrize(
    "layout",
    [
        Layout((-2,), (-1,), (-4, -3)),
        Layout((-1,), (-3, -2), (-4,)),
        Layout((-4, -2), (-3, -1)),
        Layout((-3,), (-4, -1), (-2,)),
        Layout((), (-4, -3, -2, -1)),
    ],
)
def test_matrices_of_any_layout(layout):
    """Against einsum: which entries are summed over, and in which order."""
    w = normal(0, 2, 3, 4, 5)
    parameter = Parameter("w", w, layout)
    m = parameter.matrix()
    letters = "abcd"
    of = lambda axes: "".join(letters[d] for d in sorted(axes))
    rest = [d for d in range(-4, 0) if d not in (*layout.stack, *layout.contracting)]
    order = of(layout.stack) + of(layout.contracting) + of(rest)
    np.testing.assert_array_equal(m, jnp.einsum(f"abcd->{order}", w).reshape(m.shape))
    assert m.ndim == len(layout.stack) + 2
    np.testing.assert_array_equal(parameter.from_matrix(m), w)


def watching(seen: list) -> jc.Compression:
    """Keeps what updates are given."""

    def update(decision, count, parameter):
        seen.append((parameter.path, parameter.grad))
        return decision

    init = lambda parameter: Decision(Masked(jnp.ones(parameter.value.shape, bool)))
    return compression_of(LeafMethod(lambda parameter: None, init, update), None)


@pytest.mark.parametrize("rounded", [None, "int8"])
def test_updates_see_the_gradients_at_the_view(rounded):
    """Those of pruned entries too, by which entries may come back."""
    params, x = {"a": normal(0, 8, 4), "b": normal(1, 4, 2)}, normal(2, 5, 8)
    seen = []
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), where="a")
    c = jc.chain(watching(seen), prune, jc.quantize("int8", where="b", activations=rounded))
    tx = jc.compressed_training(optax.sgd(0.1), c)
    state = tx.init(params)
    loss = jc.lift(lambda p: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"]))
    grads = jax.grad(loss)(c.view(params, state))
    tx.update(grads, state, params)
    found = dict(seen)
    np.testing.assert_array_equal(found["a"], grads["a"])
    assert (found["a"] != 0).all()
    want = grads["b"] if rounded is None else jc.weight_gradients(grads)["b"]
    np.testing.assert_array_equal(found["b"], want)
    c.update(state.compression, params)
    assert dict(seen) == {"a": None, "b": None}


def test_gradients_inside_of_accumulation():
    """One update for several batches sees the mean of their gradients."""
    params, seen = {"w": normal(0, 4, 2)}, []
    c = watching(seen)
    tx = optax.MultiSteps(jc.compressed_training(optax.sgd(0.1), c), 2)
    state = tx.init(params)
    for i in range(2):
        grads = jax.tree.map(lambda w: jnp.full(w.shape, 1.0 + 2 * i), params)  # noqa: B023
        with jax.disable_jit():
            _, state = tx.update(grads, state, params)
    np.testing.assert_allclose(seen[-1][1], 2.0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Gated(LeafState):
    """The parameter times a learned gate per row."""

    kind = "gated"
    keeps = frozenset({"zeros"})

    def apply(self, w, learned):
        return jc.materialize(w) * learned

    def compress(self, w, learned, path):
        return self.apply(w, learned)


def gated() -> jc.Compression:
    init = lambda p: Decision(Gated(), jnp.ones((p.value.shape[0], 1)))
    update = lambda decision, count, parameter: decision._replace(learned=decision.learned)
    penalty = lambda decision, parameter: (
        jnp.sum(jnp.abs(decision.learned)) + jnp.sum(parameter.dense() ** 2)
    )
    return compression_of(LeafMethod(lambda parameter: None, init, update, penalty), None)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("weight", [0.25, lambda count: 0.25 + 0.0 * count])
def test_a_penalty_is_part_of_the_loss(weight, chained):
    params, x = {"w": normal(0, 4, 2)}, normal(1, 3, 4)
    c = jc.chain(gated(), jc.quantize("int8")) if chained else gated()
    tx = jc.compressed_training(optax.identity(), c, learned=optax.identity(), penalty=weight)
    state = tx.init(params)
    loss = lambda p: jnp.sum((x @ p["w"]) ** 2)
    updates, new = jax.jit(tx.update)(jax.grad(loss)(c.view(params, state)), state, params)
    plain = jc.compressed_training(optax.identity(), c, learned=optax.identity())
    without, old = jax.jit(plain.update)(
        jax.grad(loss)(c.view(params, state)), plain.init(params), params
    )
    np.testing.assert_allclose(updates["w"] - without["w"], 0.5 * params["w"], rtol=1e-4)
    gate = lambda s: jax.tree.leaves(learned_parts(s.compression))[0]
    np.testing.assert_allclose(gate(new) - gate(old), 0.25, rtol=1e-4)  # of sum |gate|
    assert float(c.penalty(params, state.compression)) == pytest.approx(
        4 + float(jnp.sum(params["w"] ** 2)), rel=1e-5
    )


def test_a_penalty_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"penalty=0\.1: .* has no penalty"):
        jc.compressed_training(optax.sgd(0.1), jc.quantize("int8"), penalty=0.1)


def test_the_penalty_of_clipping_values_is_their_square():
    """The regularization of PACT."""
    c = jc.quantize("int4", activations=jc.activations("uint4", "clipped", high=3.0))
    params = {"a": normal(0, 4, 2), "b": normal(1, 4, 2)}
    assert float(c.penalty(params, c.init(params))) == 18.0


def test_compressions_read_as_the_calls_that_made_them():
    pruned = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4")
    assert repr(pruned) == "prune(magnitude(...), constant(...), pattern='2:4')"
    int4 = jc.quantize("int4", group_size=32)
    assert repr(jc.chain(pruned, int4)) == f"chain({pruned}, quantize('int4', group_size=32))"
    recipe = jc.chain({"**/kernel": int4, ("a", "b"): jc.low_rank(rank=8)})
    assert repr(recipe) == f"{{'**/kernel': {int4!r}, ('a', 'b'): low_rank(rank=8)}}"
    assert repr(jc.progressive({0: jc.quantize("int8")})) == "progressive({0: quantize('int8')})"
    assert repr(jc.best_of(int4, jc.hqq("nf4"))) == f"best_of({int4}, hqq('nf4'))"
    assert repr(jc.low_rank_correction(int4, 2)) == f"low_rank_correction({int4}, 2)"
