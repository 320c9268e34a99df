import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.planning.leaf_errors import _norms
from tests.array_contract import LEAVES


def weights(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rows(found):
    return {row["path"]: row for row in found["leaves"]}


METHODS = {
    "int4": (jc.quantize("int4", group_size=16), "int4 g16"),
    "asymmetric": (jc.quantize("int8", symmetric=False), "int8 asymmetric"),
    "sparse": (jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.75)), "sparse"),
    "both": (
        jc.chain(
            jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"), jc.quantize("int8")
        ),
        "sparse 2:4 + int8",
    ),
    "factors": (jc.chain(jc.low_rank(rank=8), jc.quantize("int8")), "low rank 8 of int8"),
    "rank": (jc.low_rank(rank=3), "low rank 3"),
}


def test_rows_and_total_are_what_a_direct_computation_gives():
    params = {name: weights(64, 24, seed=i) for i, name in enumerate(METHODS)}
    params |= {"bias": jnp.zeros(24), "step": jnp.int32(3), "none": None}
    small = jc.compress(params, {name: c for name, (c, _) in METHODS.items()})
    found = jc.report(params, small)
    errors, norms = [], []
    for path, row in rows(found).items():
        dense = np.asarray(jc.materialize(small[path]), np.float64)
        w = np.asarray(params[path], np.float64)
        errors.append(np.linalg.norm(dense - w))
        norms.append(np.linalg.norm(w))
        assert row["method"] == (METHODS[path][1] if path in METHODS else "dense")
        assert row["shape"] == list(w.shape)
        assert row["stored_bytes"] == jc.nbytes(small[path])
        assert row["bits_per_weight"] == pytest.approx(8 * jc.nbytes(small[path]) / w.size)
        assert row["ratio"] == pytest.approx(4 * w.size / jc.nbytes(small[path]))
        assert row["sparsity"] == pytest.approx(np.mean(dense == 0), abs=1e-6)
        expected = errors[-1] / norms[-1] if errors[-1] else 0
        assert row["relative_error"] == pytest.approx(expected, rel=1e-4)
    total = found["total"]
    assert total["stored_bytes"] == jc.nbytes(small)
    assert total["dense_bytes"] == jc.nbytes(params)
    assert total["relative_error"] == pytest.approx(
        np.hypot.reduce(errors) / np.hypot.reduce(norms)
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_errors_neither_overflow_nor_underflow(scale):
    params = {"w": weights(64, 24) * scale}
    same = jc.report(
        {"w": weights(64, 24)}, jc.compress({"w": weights(64, 24)}, jc.quantize("int4"))
    )
    found = jc.report(params, jc.compress(params, jc.quantize("int4")))
    expected = same["total"]["relative_error"]
    assert found["total"]["relative_error"] == pytest.approx(expected, rel=1e-4)


def test_it_is_plain_json_even_where_a_quotient_is_not_finite():
    params = {"zeros": jnp.zeros((4, 2)), "nan": jnp.full(3, jnp.nan), "empty": jnp.zeros((0, 2))}
    found = jc.report(params, params | {"zeros": jnp.ones((4, 2))})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert rows(found)["zeros"]["relative_error"] is None
    assert rows(found)["nan"]["relative_error"] == 0
    assert rows(found)["empty"]["bits_per_weight"] is None


def test_it_prints_as_a_table():
    params = {"a[red]": weights(64, 24), "layers": [weights(8, 8)]}
    small = jc.compress(params, {"a*": jc.quantize("int4", group_size=16)})
    text = str(jc.report(params, small))
    for word in ("a[red]", "64x24", "int4 g16", "layers/0", "dense", "total", "rel. error"):
        assert word in text
    assert max(map(len, text.splitlines())) < 100


def test_trees_that_do_not_match_are_refused():
    w = weights(4, 2)
    with pytest.raises(ValueError, match="only params has 'b'"):
        jc.report({"a": w, "b": w}, {"a": w})
    with pytest.raises(ValueError, match=r"'a' has shape \(4, 2\) in params and \(2, 4\) in small"):
        jc.report({"a": w}, {"a": w.T})


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_trees_give_the_same_numbers(axis_type):
    mesh = jax.make_mesh((8,), ("x",), (axis_type,))
    params = {"a": weights(64, 32), "b": weights(64, 32, seed=1)}
    recipe = {"a": jc.quantize("int4", group_size=16), "b": jc.low_rank(rank=4)}
    small = jc.compress(params, recipe)
    place = lambda tree: jc.shard(tree, NamedSharding(mesh, P(None, "x")))
    expected, found = jc.report(params, small), jc.report(place(params), place(small))
    for path, row in rows(found).items():
        for key, value in row.items():
            number = isinstance(value, float)
            want = rows(expected)[path][key]
            assert value == (pytest.approx(want, rel=1e-5) if number else want)


def test_no_leaf_is_compiled_twice():
    leaf = next(leaf for leaf in LEAVES if leaf.name == "int4").example().leaf
    dense = leaf.materialize()
    jc.report({"a": dense}, {"a": leaf})
    before = _norms._cache_size()
    jc.report({"a": dense, "b": dense + 1}, {"a": leaf, "b": leaf})
    assert _norms._cache_size() == before
