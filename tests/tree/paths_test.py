"""Paths, and choosing leaves by them."""

import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_compress as jc
from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.tree import map_named, named_leaves, select
from jaxopt_compress.tree.paths import paths_of


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
        ("layers/0/**", ["layers/0/mlp/kernel"]),
        ("layers/[!1]/mlp/*", ["layers/0/mlp/kernel"]),
        (jc.Glob("layers/0/**", min_ndim=1), ["layers/0/mlp/bias", "layers/0/mlp/kernel"]),
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
        (params(), "*kernel", r"did you mean '\*\*/\*kernel'"),
        (params(), "kernel", r"did you mean '\*\*/kernel'"),
        (params(), "embed", r"did you mean 'embed/\*\*'"),
        (params(), "layers.0.mlp.kernel", "did you mean 'layers/0/mlp/kernel'"),
        (params(), "mlp.kernel", r"did you mean '\*\*/mlp/kernel'"),
        (params(), "layers/{0,1}/mlp/kernel", "braces have no meaning .*: write a list of globs"),
        ({"w[0]": jnp.ones((2, 2))}, "w[0]", r"did you mean 'w\[\[\]0\]'"),
        (
            {"norm": {"bias": jnp.ones(2)}},
            "norm/*",
            r"only norm/bias.* '\*\*/bias', or .*min_ndim=1",
        ),
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
    assert select(tree) == select(tree, "*") == ["w"]
    with pytest.raises(
        TypeError, match=r"where='step' matches 'step' of shape .* and dtype .*: only floating"
    ):
        select(tree, "step")


@pytest.mark.parametrize(
    "where, message",
    [
        (re.compile(".*weight"), r"where=lambda path, leaf: re.search\('.\*weight', path\)"),
        (True, "where=True: it is a glob .*; leave it out for all weights"),
        ([True], "where=True: it is a glob"),
        (
            {"a": [True, False]},
            "where= got a dict: it is a glob .* tree of booleans .*leaf.ndim > 1",
        ),
        ([{"a": True}], "where= got a dict"),
        (jnp.ones((2, 3), bool), r"where= got an array bool\[2,3\]"),
        (lambda path: True, r"does not take \(path, leaf\)"),
        (b"**", "where= got a bytes"),
    ],
)
def test_what_is_no_choice(where, message):
    with pytest.raises(TypeError, match=message) as caught:
        select(params(), where)
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", [False, True])
def test_a_glob_that_names_matrices_and_vectors_warns(recipe):
    tree = {"dense": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, "norm": {"w": jnp.ones(4)}}

    def compress(where):
        c = jc.quantize("int8")
        jc.compress(tree, {where: c} if recipe else jc.quantize("int8", where=where))

    with pytest.warns(
        UserWarning, match=r"where='\*\*/w' names norm/w of rank below 2 too.*min_ndim"
    ):
        compress("**/w")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", jc.AssumedLayout)
        for where in (
            "**",
            "**/b",
            "norm/w",
            "dense/w",
            jc.Glob("**/w", min_ndim=1),
            ("**/b", "*/b"),
        ):
            compress(where)


@pytest.mark.filterwarnings("ignore:where=")
def test_a_glob_takes_weights_or_what_it_names():
    """The one rule, in `where` of a method, in recipes, and where uses are known."""
    ones = {"weight": jnp.ones((4, 4)), "bias": jnp.ones(4), "table": jnp.ones((2, 4))}
    tree = {"dense": ones, "norm": {"weight": jnp.ones(4)}, "step": jnp.int32(0)}

    def model(params, x):
        out = x @ params["dense"]["weight"] + params["dense"]["bias"] + params["dense"]["table"][0]
        return out * params["norm"]["weight"]

    def taken(recipe, **given):
        small = jc.compress(tree, recipe, **given)
        return [path for path, leaf in named_leaves(small) if isinstance(leaf, QuantizedArray)]

    weights = ["dense/table", "dense/weight"]
    c, uses = jc.quantize("int8"), jc.uses(model, tree, jnp.ones((2, 4)))
    for globs, paths in {
        "**": weights,
        "dense/*": weights,
        "dense/[!t]*": ["dense/weight"],
        "**/weight": ["dense/weight", "norm/weight"],
        "dense/bias": ["dense/bias"],
        ("**/bias", "norm/weight"): ["dense/bias", "norm/weight"],
        jc.Glob("**/weight", min_ndim=2): ["dense/weight"],
        jc.Glob("dense/*", min_ndim=1): ["dense/bias", *weights],
    }.items():
        assert taken({globs: c}) == taken(jc.quantize("int8", where=globs)) == paths
        where = taken(jc.quantize("int8", where=globs), uses=uses)
        assert taken({globs: c}, uses=uses) == where
    assert taken(c, uses=uses) == taken({"**": c}, uses=uses) == ["dense/weight"]
    # What a wildcard does not take is left to the rules that follow.
    assert taken({"dense/*": c, "**/bias": c}) == ["dense/bias", *weights]
