"""Frontiers and the smallest model within a bound, on a classifier of three layers."""

import sys
import tomllib
import types

import jax
import jax.numpy as jnp
import optax
import pytest
from sklearn.datasets import load_digits

import jaxopt_compress as jc
from jaxopt_compress.planning import Allocation
from jaxopt_compress.search.recipes import as_toml, default_candidates, made

TABLES = {name: default_candidates()[name] for name in ("int2", "int4")}


def model(params, x):
    return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()


@pytest.fixture(scope="module")
def digits():
    """Trained parameters, batches to find sensitivities with, and held-out batches."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x, jnp.float32) / 16, jnp.asarray(y)
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, 64)) / 6},
        "head": {"kernel": jax.random.normal(keys[1], (64, 10)) / 6},
    }
    tx = optax.adam(1e-2)

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(loss)(params, x[:1200], y[:1200])
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    batches = [(x[:512], y[:512]), (x[512:1024], y[512:1024])]
    return fit(params), batches, [(x[1200:], y[1200:])]


def test_default_candidates_can_be_read():
    assert list(made(default_candidates())) == list(default_candidates())


def test_text_of_a_recipe_is_toml():
    table = {
        "quantize": {"format": "int4", "group_size": None, "bounds": {"mse": {"candidates": 9}}}
    }
    recipe = Allocation({("a/[[]0]",): jc.quantize("int4")}, {"a/[0]": "x", "b": "dense"}, 0, 0.0)
    (rule,) = tomllib.loads(as_toml(recipe, {"x": table}))["rule"]
    del table["quantize"]["group_size"]
    assert rule == {"where": ["a/[[]0]"], **table}


@pytest.fixture(scope="module")
def found(digits):
    params, batches, held_out = digits
    given = {"within": {"accuracy": -0.02}, "held_out": held_out, "candidates": TABLES}
    return jc.auto(model, params, batches, loss, evaluations=4, measured=1, **given)


@pytest.mark.ci
def test_the_smallest_within_the_bound(digits, found):
    params, _, held_out = digits
    assert found.met and found.dense["accuracy"] > 0.85
    measured = jc.evaluate(model, found.params, held_out, ["accuracy"])
    assert measured == found.figures
    assert measured["accuracy"] >= found.dense["accuracy"] - 0.02
    assert jc.nbytes(found.params) == min(t.bytes for t in found.trials if t.met)
    assert any(not t.met for t in found.trials)
    # No one format for all, of those that keep the bound, is smaller.
    uses = jc.uses(model, params, held_out[0][0])
    for compression in made(TABLES).values():
        small = jc.compress(params, compression, uses=uses)
        accuracy = jc.evaluate(model, small, held_out, ["accuracy"])["accuracy"]
        if accuracy >= found.dense["accuracy"] - 0.02:
            assert jc.nbytes(found.params) <= jc.nbytes(small)


@pytest.mark.ci
def test_the_recipe_as_text_gives_the_same_again(digits, found, tmp_path):
    params, _, held_out = digits
    (tmp_path / "recipe.toml").write_text(found.toml())
    uses = jc.uses(model, params, held_out[0][0])
    again = jc.compress(params, jc.read_recipe(tmp_path / "recipe.toml"), uses=uses)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), again, found.params)
    assert all(jax.tree.leaves(same))
    assert "dense" in str(found) and "no" in str(found)


@pytest.mark.ci
def test_bounds_that_nothing_keeps_and_errors_of_both_signs(digits, found):
    params, batches, held_out = digits
    common = {"held_out": held_out, "evaluations": 3, "measured": 1}
    call = lambda **given: jc.auto(model, params, batches, loss, **common | given)
    few = {"int2": jc.quantize("int2")}
    worse = call(within={"cross_entropy": 1e-6}, candidates=few)
    assert not worse.met and worse.recipe is None and worse.params is params
    with pytest.raises(ValueError, match="no recipe"):
        worse.toml()
    loose = call(within={"cross_entropy": 100.0}, candidates=few, budget=jc.bytes(0.2))
    assert loose.met and loose.figures["cross_entropy"] > loose.dense["cross_entropy"]
    with pytest.raises(ValueError, match="'int2' is a Compression"):
        loose.toml()
    for bad in ({}, {"accuracy": 0}, {"accuracy": float("nan")}):
        with pytest.raises(ValueError, match="within"):
            call(within=bad)
    with pytest.raises(ValueError, match="evaluations=2"):
        call(within={"accuracy": -0.1}, evaluations=2)
    with pytest.raises(ValueError, match=r"candidates\['x'\]: unknown key 'quantise'"):
        call(within={"accuracy": -0.1}, candidates={"x": {"quantise": {}}})


def test_where_no_candidate_is_smaller_parameters_stay():
    fn = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, jnp.eye(2)
    squares = lambda params, x, y: jnp.mean((fn(params, x) - y) ** 2)
    batch, few = (x, fn(params, x)), {"share": jc.share(16)}
    within, held = {"rmse": 0.1}, {"held_out": [batch], "candidates": few}
    kept = jc.auto(fn, params, [batch], squares, within=within, **held)
    assert kept.met and kept.params is params and not kept.recipe


@pytest.mark.ci
def test_a_frontier_measures_what_it_returns(digits, found):
    params, _, held_out = digits
    uses = jc.uses(model, params, held_out[0][0])
    budgets = [jc.bytes(share) for share in (0.3, 0.15)]
    tuned = []

    def tune(recipe):
        tuned.append(recipe)
        return jc.compress(params, recipe, uses=uses)

    args = (model, params, found.table, budgets, held_out, ["accuracy"])
    points, by_hook = jc.frontier(*args, uses=uses), jc.frontier(*args, uses=uses, tune=tune)
    assert list(points) == ["dense", "30%", "15%"] and len(tuned) == 2
    for name, row in points.items():
        assert row["stored_bytes"] == jc.nbytes(points.trees[name])
        assert row["stored_bytes"] <= row["budget"] * found.table.dense_bytes
        assert row == by_hook[name]
    assert points["15%"]["increase"] >= points["30%"]["increase"] >= 0
    assert "15%" in str(points)
    with pytest.raises(ValueError, match="different shares"):
        jc.frontier(model, params, found.table, [], held_out, ["accuracy"])


@pytest.mark.ci
def test_the_command_stores_what_it_finds(monkeypatch, tmp_path):
    from jaxopt_compress import cli

    params = {"w": jax.random.normal(jax.random.key(0), (64, 4))}
    linear = lambda params, x: x @ params["w"]
    x = jax.random.normal(jax.random.key(1), (256, 64))
    batches = [(x, linear(params, x))]
    given = {
        "fn": linear,
        "params": params,
        "batches": batches,
        "loss": lambda params, x, y: jnp.mean((linear(params, x) - y) ** 2),
        "within": {"rmse": 0.5},
        "held_out": batches,
        "candidates": {"int8": {"quantize": {"format": "int8"}}},
    }
    module = types.ModuleType("mine")
    module.__dict__["task"] = lambda: given
    monkeypatch.setitem(sys.modules, "mine", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.auto("mine:task", tmp_path / "out", recipe=tmp_path / "recipe.toml")
    assert jc.nbytes(jc.load(tmp_path / "out")) == 272
    assert list(jc.read_recipe(tmp_path / "recipe.toml")) == [("w",)]
    with pytest.raises(FileExistsError):
        cli.auto("mine:task", tmp_path / "out")
    with pytest.raises(ValueError, match="module:function"):
        cli.auto("mine", tmp_path / "other")
    given["within"] = {"rmse": 1e-9}
    with pytest.raises(ValueError, match="nothing was written"):
        cli.auto("mine:task", tmp_path / "other")
    assert not (tmp_path / "other").exists()
