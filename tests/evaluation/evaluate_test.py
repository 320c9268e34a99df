"""How functions, parameters and batches are taken; what is compiled, and what comparisons hold."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc


def model(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"in": new(16, 32), "out": new(32, 8)}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    new = lambda n: (
        jnp.asarray(rng.normal(size=(n, 16)), "f4"),
        jnp.asarray(rng.integers(0, 8, n)),
    )
    return [new(20), new(20), new(7)]


def accuracy(fn, params, batches):
    right = [np.asarray(fn(params, x)).argmax(-1) == np.asarray(y) for x, y in batches]
    return np.concatenate(right).mean()


def test_compressed_parameters_run_lifted(params, batches):
    small = jc.compress(params, jc.quantize("int4"))
    found = jc.evaluate(model, small, iter(batches), ["accuracy"])
    assert found == {"accuracy": accuracy(model, jc.materialize(small), batches)}
    assert jc.evaluate(jc.lift(model), small, batches, ["accuracy"]) == found
    assert jc.evaluate(jax.jit(jc.lift(model)), small, batches, ["accuracy"]) == found


def test_a_fallback_is_an_error_where_asked_for(params, batches):
    small = jc.compress(params, jc.quantize("int8"))
    sorts = lambda params, x: x @ jnp.sort(params["in"]) @ params["out"]
    for fn in (sorts, jc.lift(sorts, on_fallback="error")):
        with pytest.raises(jc.FallbackError, match="in"):
            jc.evaluate(fn, small, batches, ["accuracy"], on_fallback="error")
    # The policy of a function that is lifted already is its own.
    with pytest.raises(jc.FallbackError, match="in"):
        jc.evaluate(jc.lift(sorts, on_fallback="error"), small, batches, ["accuracy"])


def test_shapes_are_compiled_once_over_calls(params, batches):
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return model(params, x)

    for _ in range(3):
        jc.evaluate(counted, params, batches, ["accuracy", jc.metrics.top_k(2)])
    assert traced == [(20, 16), (7, 16)]


def test_several_inputs_are_a_tuple_and_what_is_no_array_is_static(params, batches):
    def masked(params, x, options):
        assert options["kind"] == "tanh" and params["name"] == "a"
        return model(params, x * options["mask"])

    mask = jnp.arange(16) % 2
    given = [((x, {"mask": mask, "kind": "tanh"}), y) for x, y in batches]
    found = jc.evaluate(masked, {**params, "name": "a"}, given, ["accuracy"])
    assert found["accuracy"] == accuracy(lambda p, x: model(p, x * mask), params, batches)


class Unhashable:
    __hash__ = None

    def __call__(self, params, x):
        return model(params, x)


def test_any_callable_will_do(params, batches):
    found = jc.evaluate(Unhashable(), params, batches, ["accuracy"])
    assert found["accuracy"] == accuracy(model, params, batches)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        (jnp.ones((2, 16)), TypeError, "batches is one array"),
        ([jnp.ones((2, 16))], ValueError, r"a batch is \(inputs, targets\)"),
        ([(1, 2, 3, 4)], ValueError, "batch 0 is 4 parts"),
    ],
)
def test_batches_are_pairs_or_triples(params, batches, error, message):
    with pytest.raises(error, match=message):
        jc.evaluate(model, params, batches, ["accuracy"])
    with pytest.raises(error, match=message):
        jc.compare(model, {"a": params}, batches, ["accuracy"])


def test_comparisons_are_what_direct_computations_give(params, batches):
    factors = jc.LowRankArray(params["in"].T[:, :3], params["in"][:3, :8], jnp.dtype("f4"))
    variants = {
        "dense": params,
        "int2": jc.compress(params, jc.quantize("int2")),
        "factors": params | {"out": factors},
    }
    found = jc.compare(model, variants, iter(batches), ["accuracy", "cross_entropy"], rounds=7)
    whole = np.concatenate([np.asarray(model(params, x)) for x, _ in batches])
    for name, small in variants.items():
        row, dense = found[name], jc.materialize(small)
        out = np.concatenate([np.asarray(model(dense, x)) for x, _ in batches])
        assert row["accuracy"] == accuracy(model, dense, batches)
        assert row["agreement"] == np.mean(out.argmax(-1) == whole.argmax(-1))
        difference = np.linalg.norm(out - whole) / np.linalg.norm(whole)
        assert row["difference"] == pytest.approx(difference, rel=1e-4)
        assert row["stored_bytes"] == jc.nbytes(small)
        assert row["ratio"] == jc.nbytes(params) / jc.nbytes(small)
        assert row["resident_bytes"] == jc.resident_bytes(small)
        times = row["milliseconds"]
        assert 0 < times["low"] <= times["median"] <= times["high"]
        if name != "dense":
            ratio = row["time_ratio"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
            assert ratio["noise"] == (ratio["low"] <= 1 <= ratio["high"])
    assert "time_ratio" not in found["dense"]
    slow = {"median": 2.0, "low": 1.5, "high": 2.5, "noise": False}
    found["int2"]["time_ratio"], found["factors"]["time_ratio"] = (
        slow,
        slow | {"low": 0.5, "noise": True},
    )
    assert "2.00 [1.50, 2.50]\n" in str(found).replace("  ", "\n")
    assert "2.00 [0.50, 2.50], noise" in str(found)
    assert found["dense"]["difference"] == 0 and found["dense"]["agreement"] == 1
    assert found["dense"]["flops"] == found["int2"]["flops"] == 2 * 20 * (16 * 32 + 32 * 8)
    assert found["factors"]["flops"] == 2 * 20 * (16 * 32 + 3 * (32 + 8))
    assert json.loads(json.dumps(found)) == found


def test_outputs_without_classes_have_no_agreement(params, batches):
    regression = [(x, jnp.zeros((len(x), 8))) for x, _ in batches]
    found = jc.compare(model, {"a": params, "b": params}, regression, ["rmse"], rounds=0)
    assert not {"agreement", "milliseconds", "compile_seconds", "paired"} & set(found["b"])
    answers, costs = (table.splitlines() for table in str(found).split("\n\n"))
    assert answers[0].split() == "variant rmse difference".split()
    assert costs[0].split() == "variant bytes ratio in memory flops moved uJ".split()
    assert [line.split()[0] for line in answers[2:] + costs[2:]] == ["a", "b", "a", "b"]


def test_examples_without_weight_do_not_count_in_relations(params, batches):
    x, y = batches[0]
    weights = jnp.arange(20) < 9
    variants = {"a": params, "b": jc.compress(params, jc.quantize("int2"))}
    padded = jc.compare(model, variants, [(x, y, weights)], ["accuracy"], rounds=0)
    short = jc.compare(model, variants, [(x[:9], y[:9])], ["accuracy"], rounds=0)
    for key in ("accuracy", "agreement", "difference"):
        assert padded["b"][key] == pytest.approx(short["b"][key], rel=1e-6)


def test_unknown_numbers_of_steps_have_no_flops(batches):
    def repeated(params, x):
        again = lambda carry: carry @ params["w"]
        return jax.lax.while_loop(lambda c: jnp.abs(c).max() > 1, again, x)

    found = jc.compare(repeated, {"a": {"w": jnp.eye(16) / 2}}, batches, ["accuracy"], rounds=0)
    assert not {"flops", "microjoules"} & set(found["a"]) and found["a"]["moved_bytes"] > 0


def test_different_outputs_of_zeros_are_infinitely_far():
    fn = lambda params, x: x * params
    batch = [(jnp.ones(3), jnp.zeros(3))]
    found = jc.compare(fn, {"a": 0.0, "b": 1.0, "c": 0.0}, batch, ["rmse"], rounds=0)
    assert [found[k]["difference"] for k in "abc"] == [0.0, math.inf, 0.0]


def test_variants_and_names_are_checked(params, batches):
    with pytest.raises(ValueError, match="variants is empty"):
        jc.compare(model, {}, batches, ["accuracy"])
    with pytest.raises(ValueError, match="the metric 'ratio' has the name of a figure"):
        jc.compare(model, {"a": params}, batches, [jc.metrics.mean(jnp.equal, "ratio")])


def test_rich_prints_the_same_cells(params, batches):
    rich = pytest.importorskip("rich.console")
    found = jc.compare(model, {"a[b]": params}, batches, ["accuracy"], rounds=0)
    console = rich.Console(width=200)
    with console.capture() as capture:
        console.print(found)
    printed = capture.get()
    for word in str(found).split():
        assert set(word) == {"-"} or word in printed
