"""What stays, what differs from masking, and what errors say of either."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_compress as jc
from tests.removal import law

pytestmark = pytest.mark.ci

X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
PARAMS = law.values({"b": jnp.ones(6), "v": jnp.ones((6, 2)), "w": jnp.ones((3, 6))})


def net(middle):
    return lambda p, x: middle(x @ p["w"] + p["b"]) @ p["v"]


STAYS = {
    "argmax": (lambda h: h + h.argmax(1)[:, None], "argmax at .* numbers its indices"),
    "cumsum": (lambda h: jnp.cumsum(h, 1), "cumsum at .* runs along it"),
    "sort": (lambda h: jnp.sort(h, 1), "sort at .* orders it"),
    "fft": (lambda h: jnp.fft.fft(h).real, "operand of fft"),
    "reshape": (lambda h: h.reshape(3, 8).sum() + h, "reshape at .* has no factors in common"),
    "lookup": (lambda h: h + h[:, jnp.int32(h[:, 0])][:, :1], "gather at .* looks it up by index"),
    "negative_pad": (lambda h: jnp.pad(lax.pad(h, 0.0, [(0, 0, 0), (-1, 0, 0)]), ((0, 0), (1, 0))),
                     "pad at .* pads between its entries, or cuts it"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_indices_that_stay(name):
    middle, why = STAYS[name]
    groups = jc.find_groups(net(middle), PARAMS, X)
    assert "w:1" not in groups
    assert re.search(f"6 of its 6 indices stay: .*({why})", groups.why("w", 1))


def test_inputs_and_outputs_stay():
    groups = jc.find_groups(net(jax.nn.relu), PARAMS, X)
    assert groups.why("w", 0) == "3 of its 3 indices stay: it is an axis of the input 'in/0'"
    assert groups.why("v", -1) == "2 of its 2 indices stay: it is an axis of the output 'out'"
    assert groups.why("w", 1) == "its indices are units of 'w:1', with b axis 0, v axis 0"


def test_protected_parameters_stay():
    groups = jc.find_groups(net(jax.nn.relu), PARAMS, X, protect="v")
    assert not groups
    assert "'v' is protected" in groups.why("w", 1)


INEXACT = {
    "softmax": (jax.nn.softmax, "reduce_max"),
    "top_k": (lambda h: h + lax.top_k(-jnp.abs(h), 1)[0], "top_k"),
    "logsumexp": (lambda h: h - jnp.log(jnp.exp(h).sum(1, keepdims=True)), "reduce_sum"),
    "product": (lambda h: h * jnp.prod(h, 1, keepdims=True), "reduce_prod"),
    "sum_of_sigmoids": (lambda h: h * jax.nn.sigmoid(h).sum(1, keepdims=True), "they are 0.5"),
    # 0 / 0, which no later product with 0 undoes.
    "norm_of_columns": (lambda h: h / jnp.abs(h).sum(0), "dot_general"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_removals_are_refused_with_the_reason(name):
    middle, why = INEXACT[name]
    groups = jc.find_groups(net(middle), PARAMS, X)
    assert why in "; ".join(groups["w:1"].inexact)
    with pytest.raises(jc.NotRemovable, match=f"(?s){why}.*allow_inexact=True"):
        groups.plan({"w:1": [0]})
    plan = groups.plan({"w:1": [0]}, allow_inexact=True)
    with pytest.raises(ValueError, match="differs from its reference"):
        plan.check(PARAMS, X, tolerance=1e-3)
    assert plan.rewrite().params["w"].shape == (3, 5)


def test_one_pass_variance_is_exact():
    def norm(h):
        mean, square = h.mean(1, keepdims=True), jnp.square(h).mean(1, keepdims=True)
        return (h - mean) * lax.rsqrt(square - mean**2 + 1e-3)

    plan = jc.find_groups(net(norm), PARAMS, X).plan({"w:1": [1, 2]})
    law.check(net(norm), PARAMS, (X,), plan)


@pytest.mark.fast("two_passes", "affine_of_two_axes")
@pytest.mark.parametrize("name", ["two_passes", "affine_of_two_axes", "in_jit", "remat", "scan"])
def test_layer_norms_by_two_passes_are_exact(name):
    """Removed entries are minus the mean of a row, and count in the variance as often as before."""

    def norm(h, axes=(-1,)):
        mean = h.mean(axes, keepdims=True)
        variance = jnp.square(h - mean).mean(axes, keepdims=True)
        return (h - mean) / jnp.sqrt(variance + 1e-3)

    def two_axes(h):
        wide = h[:, None] * jnp.array([1.0, 2.0])[:, None]
        return norm(wide, (1, 2)).sum(1) * h.mean(1, keepdims=True)

    layers = {
        "two_passes": norm,
        "affine_of_two_axes": two_axes,
        "in_jit": lambda h: jax.jit(
            lambda d: d * jax.jit(jnp.var, static_argnums=1)(d, 1)[:, None]
        )(h - jnp.mean(h, 1)[:, None]),
        "remat": jax.checkpoint(norm),
        "scan": lambda h: lax.scan(lambda c, _: (c * norm(c), None), h, None, length=2)[0],
    }
    groups = jc.find_groups(net(layers[name]), PARAMS, X)
    assert not groups["w:1"].inexact
    law.check(net(layers[name]), PARAMS, (X,), groups.plan({"w:1": [0, 3, 4]}), rtol=1e-4)


def test_masked_attention_over_removed_scores_is_exact():
    """-inf is what a maximum ignores, and its exponential is what a sum ignores."""
    inside = lambda h: jax.nn.softmax(jnp.where(h == 0, -jnp.inf, h))
    groups = jc.find_groups(net(inside), PARAMS, X)
    assert any("reduce_max" in why for why in groups["w:1"].inexact)  # h == 0 may hold elsewhere


class TestPlans:
    @pytest.fixture(scope="class")
    def groups(self):
        return jc.find_groups(net(jax.nn.relu), PARAMS, X)

    def test_kept_indices_survive_json(self, groups):
        plan = groups.plan({"w:1": [4, 1]})
        assert plan.kept == {k: {a: [0, 2, 3, 5]} for k, a in (("b", 0), ("v", 0), ("w", 1))}
        again = groups.plan(kept=json.loads(json.dumps(plan.kept)))
        assert again.kept == plan.kept and again.flops == plan.flops == (240, 160)
        assert repr(again) == "<Plan that removes indices of b, v, w, 66.7% of the FLOPs left>"

    def test_small_parameters_run_without_the_whole_ones(self, groups):
        plan, fn = groups.plan({"w:1": [4, 1]}), net(jax.nn.relu)
        types = jax.eval_shape(lambda: PARAMS)
        again = jc.find_groups(fn, types, X).plan(kept=plan.kept).rewrite()
        small = plan.rewrite().params
        assert jax.tree.map(jnp.shape, again.params) == jax.tree.map(jnp.shape, small)
        np.testing.assert_array_equal(
            again.function(fn)(small, X), plan.rewrite().function(fn)(small, X)
        )

    @pytest.mark.parametrize(
        "kept, why",
        [
            ({"u": {0: [0]}}, "'u', and the parameters are b, v, w"),
            ({"w": {2: [0]}}, "axis 2 of 'w'"),
            ({"w": {1: [9]}}, "indices up to 9"),
            ({"w": {1: [0]}}, "without what goes with them"),
        ],
    )
    def test_wrong_kept_indices(self, groups, kept, why):
        with pytest.raises(ValueError, match=why):
            groups.plan(kept=kept)

    @pytest.mark.parametrize(
        "arguments, why",
        [
            (({"u:1": [0]},), "no group 'u:1'; there are w:1"),
            (({"w:1": [6]},), "units 0 to 5, and not 6 to 6"),
            (({"w:1": range(6)},), "at least one has to stay"),
            ((), "one of units, budget= and kept="),
            (({"w:1": [0]}, 0.5), "one of units, budget= and kept="),
            ((None, 0.5), r"flops\(0.5\) is one"),
            ((None, jc.flops(0.01)), "cannot be met: with one unit of each group, 0.1667"),
        ],
    )
    def test_wrong_plans(self, groups, arguments, why):
        units, budget = (*arguments, None, None)[:2]
        with pytest.raises((ValueError, TypeError), match=why):
            groups.plan(units, budget=budget)

    def test_wrong_rounding(self, groups):
        assert len(groups.plan({"w:1": [0, 1]}, round_to=4).units["w:1"]) == 2
        with pytest.raises(ValueError, match=r"5 units .* multiple of 4: remove 2 units"):
            groups.plan({"w:1": [0]}, round_to=4)
        with pytest.raises(ValueError, match="round_to=0"):
            groups.plan({"w:1": [0]}, round_to=0)

    def test_wrong_names(self, groups):
        with pytest.raises(ValueError, match="no parameter 'u'; there are b, v, w"):
            groups.why("u", 0)
        with pytest.raises(ValueError, match="has no axis 2"):
            groups.why("w", 2)
        with pytest.raises(ValueError, match="reduce='median'"):
            groups.scores(reduce="median")

    def test_wrong_parameters(self, groups):
        rewrite = groups.plan({"w:1": [0]}).rewrite()
        with pytest.raises(ValueError, match=r"'b' has shape \(6,\), and \(5,\) are left"):
            rewrite.function(net(jax.nn.relu))(PARAMS, X)
        with pytest.raises(ValueError, match=r"beside 'b' has shape \(5,\), and not \(6,\)"):
            rewrite.tree(rewrite.params)

    def test_another_function_that_couples_more(self, groups):
        rewrite = groups.plan({"w:1": [0]}).rewrite()
        with pytest.raises(jc.NotRemovable, match=r"couples the removed indices with \[5\]"):
            rewrite.function(net(lambda h: h + h[:, ::-1]))(rewrite.params, X)


def test_wrong_arguments_of_find_groups():
    with pytest.raises(ValueError, match="protect='u' chooses nothing; there are b, v, w"):
        jc.find_groups(net(jax.nn.relu), PARAMS, X, protect="u")
    with pytest.raises(ValueError, match="follow='in/1' chooses nothing; there are in/0, out"):
        jc.find_groups(net(jax.nn.relu), PARAMS, X, follow=("out", "in/1"))
    small = jc.compress(PARAMS, jc.quantize("int8", where="w"), uses=jc.uses(net(abs), PARAMS, X))
    with pytest.raises(TypeError, match="'w' is a QuantizedArray"):
        jc.find_groups(net(jax.nn.relu), small, X)


def stacked(before):
    """Layers in a scan, with or without a norm of the sum."""

    def fn(p, x):
        def layer(x, at):
            out = x + jnp.tanh(x @ at["w"] + at["b"]) @ at["v"]
            return (out if before else out / (1 + jnp.abs(out))) * 1.0, None

        return lax.scan(layer, x, {k: p[k] for k in "wbv"})[0] @ p["o"]

    shapes = {"w": (4, 3, 5), "b": (4, 5), "v": (4, 5, 3), "o": (3, 2)}
    return fn, law.values({k: jnp.ones(s) for k, s in shapes.items()})


def test_layers_of_a_scan_are_units():
    fn, params = stacked(True)
    groups = jc.find_groups(fn, params, X)
    assert {k: (len(g), g.layers) for k, g in groups.items()} == {
        "w:0": (4, True),
        "w:2": (5, False),
    }
    plan = groups.plan({"w:0": [0, 2], "w:2": [1]})
    assert plan.kept["v"] == {0: [1, 3], 1: [0, 2, 3, 4]}
    # Two layers of 4 rows, 3 inputs and 4 hidden units, and the last product.
    assert plan.flops[1] == 2 * 2 * (2 * 4 * 3 * 4) + 2 * 4 * 3 * 2
    law.check(fn, params, (X,), plan)
    assert set(groups.plan(budget=jc.flops(0.6)).units) == {"w:2"}


def test_layers_that_change_what_they_carry_are_inexact():
    fn, params = stacked(False)
    groups = jc.find_groups(fn, params, X)
    assert "scan at" in groups["w:0"].inexact[0] and not groups["w:2"].inexact
    with pytest.raises(jc.NotRemovable, match="runs over steps that, masked, change"):
        groups.plan({"w:0": [1]})


def test_layers_whose_results_are_returned_stay():
    def fn(p, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), x), x, p["w"])

    groups = jc.find_groups(fn, law.values({"w": jnp.ones((4, 3, 3))}), X)
    assert "output 'out/1'" in groups.why("w", 0)
