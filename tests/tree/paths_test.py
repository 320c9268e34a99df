"""Paths, and choosing leaves by them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.tree import map_named, named_leaves, select
from jaxopt_compress.tree.paths import glob_matches, paths_of


def compressed(shape=(4, 2)):
    codes = jnp.ones(shape, jnp.int8)
    return QuantizedArray(codes, jnp.ones((1, shape[1])), None, jnp.dtype("float32"), "int8", -2)


def params():
    block = {"mlp": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    return {
        "embed": {"embedding": jnp.ones((8, 4))},
        "layers": [block, (block, {"kernel": compressed()})],
    }


class Affine(eqx.Module):
    weight: jax.Array
    layers: list


@pytest.mark.parametrize(
    "tree, paths",
    [
        (params()["layers"], ["0/mlp/bias", "0/mlp/kernel", "1/0/mlp/bias", "1/0/mlp/kernel"]),
        (nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), ["bias", "kernel"]),
        (Affine(jnp.ones(2), [Affine(jnp.ones(3), [])]), ["weight", "layers/0/weight"]),
        ({"value": jnp.ones(2), "a/b": jnp.ones(2)}, ["a/b", "value"]),
        (jnp.ones(2), [""]),
        ({"mlp/~/linear_0": {"w": jnp.ones(2)}}, ["mlp/~/linear_0/w"]),
    ],
)
def test_names(tree, paths):
    assert [path for path, _ in named_leaves(tree)][: len(paths)] == paths


def test_modules_of_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, use_bias=False, rngs=rngs) for _ in range(2)])

    state = nnx.state(Model(nnx.Rngs(0)))
    assert select(state) == ["layers/0/kernel", "layers/1/kernel"]
    doubled = map_named(lambda path, x: x * 2 if path == "layers/1/kernel" else x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    for (_, a), (_, b), factor in zip(
        named_leaves(doubled), named_leaves(state), (1, 2), strict=True
    ):
        np.testing.assert_array_equal(a, factor * b)


def test_a_compressed_array_is_one_leaf():
    assert named_leaves(params())[-1][0] == "layers/1/1/kernel"
    named = map_named(lambda path, x, y: (path, type(x).__name__, y), {"a": compressed()}, {"a": 3})
    assert named == {"a": ("a", "QuantizedArray", 3)}


def test_the_value_of_a_variable_is_named_like_it():
    value, query = jax.tree_util.GetAttrKey("value"), jax.tree_util.GetAttrKey("query")
    kernel, item = jax.tree_util.DictKey("kernel"), jax.tree_util.DictKey("value")
    assert paths_of([(kernel, value)]) == ["kernel"]
    assert paths_of([(value,)]) == ["value"]
    assert paths_of([(kernel, item)]) == ["kernel/value"]
    # A layer with fields query and value is no variable.
    assert paths_of([(kernel, query), (kernel, value)]) == ["kernel/query", "kernel/value"]


def test_paths_that_collide_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        select({"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}})


@pytest.mark.parametrize(
    "pattern, yes, no",
    [
        ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"], ["kernels", "a/xkernel", "kernel/a"]),
        ("*/kernel", ["a/kernel"], ["kernel", "a/b/kernel"]),
        ("a/**", ["a", "a/b", "a/b/c"], ["ab", "b/a"]),
        ("a/**/c", ["a/c", "a/b/c", "a/b/b/c"], ["ac", "a/bc"]),
        ("**", ["a", "a/b"], []),
        ("a?/b*", ["ax/b", "ax/bcd"], ["a/b", "ax/b/c", "axy/b"]),
        ("w[0].+(x)", ["w[0].+(x)"], ["w0", "w[0]xx"]),
        ("a**/b", ["ac/b", "a/b"], ["ab", "b"]),
    ],
)
def test_globs(pattern, yes, no):
    assert all(glob_matches(pattern, path) for path in yes)
    assert not any(glob_matches(pattern, path) for path in no)


@pytest.mark.parametrize(
    "where, paths",
    [
        (
            None,
            [
                "embed/embedding",
                "layers/0/mlp/kernel",
                "layers/1/0/mlp/kernel",
                "layers/1/1/kernel",
            ],
        ),
        ("layers/*/kernel", []),
        ("layers/1/*/kernel", ["layers/1/1/kernel"]),
        ("**/bias", ["layers/0/mlp/bias", "layers/1/0/mlp/bias"]),
        (lambda path, leaf: leaf.shape == (8, 4), ["embed/embedding"]),
        (["embed/**", ("**/0/mlp/bias",)], ["embed/embedding", *["layers/0/mlp/bias"]]),
    ],
)
def test_select(where, paths):
    if not paths:
        with pytest.raises(ValueError, match="matches no leaf"):
            select(params(), where)
    else:
        got = select(params(), where)
        assert [
            path for path in got if path != "layers/1/0/mlp/bias" or where == "**/bias"
        ] == paths


@pytest.mark.parametrize(
    "tree, where, message",
    [
        (params(), "layers/0/mlp/kernal", "nearest paths are layers/0/mlp/kernel"),
        (params(), ["embeds/*", "embeding"], "nearest paths are embed/embedding"),
        (params(), lambda path, leaf: False, "the paths are embed/embedding, layers/0/mlp/bias"),
        (params(), ["embed/*", "layers/0/mlp/kernal"], "where='layers/0/mlp/kernal' matches no"),
        (params(), [], "the paths are embed/embedding"),
        ({"b": jnp.ones(3)}, None, "no floating leaf of rank 2 or more among b"),
        ({}, "**", "the tree has no leaves"),
    ],
)
def test_nothing_chosen(tree, where, message):
    with pytest.raises(ValueError, match=message):
        select(tree, where)


def test_the_owner_is_named():
    with pytest.raises(ValueError, match="quantize's recipe='x' matches no leaf"):
        select(params(), "x", "quantize's recipe")


@pytest.mark.parametrize("leaf", [jnp.arange(3), np.arange(3), jax.random.key(0), "text", 3, 2.5])
def test_leaves_that_are_no_floats(leaf):
    tree = {"w": jnp.ones((2, 2)), "step": leaf}
    assert select(tree) == ["w"]
    with pytest.raises(
        TypeError, match=r"where='\*\*' matches 'step' of shape .* and dtype .*: only floating"
    ):
        select(tree, "**")
