"""Recipes in files: what they take, and what they say of what they do not."""

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.planning import assign, read_recipe, read_rules
from jaxopt_compress.planning.arguments import _BOUNDS, call
from jaxopt_compress.planning.recipe import _METHODS

W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
RECIPE = """
[[rule]]
where = "**/kernel"
prune = {sparsity = 0.5, pattern = "2:4"}
quantize = {format = "int8"}

[[rule]]
low_rank = {rank = 2}
"""


def recipe(tmp_path, text):
    (tmp_path / "r.toml").write_text(text)
    return read_recipe(tmp_path / "r.toml")


def test_a_recipe_is_read_in_order(tmp_path):
    params = {"a": {"kernel": W}, "table": W[:6], "bias": W[0]}
    small = jc.compress(params, recipe(tmp_path, RECIPE))
    methods = {row["path"]: row["method"] for row in jc.report(params, small)["leaves"]}
    assert methods == {"a/kernel": "sparse 2:4 + int8", "table": "low rank 2", "bias": "dense"}
    rules = read_rules(tmp_path / "r.toml")
    leaves = {"a/kernel": W, "table": W, "bias": W[0]}
    assert assign(rules, leaves) == {"a/kernel": rules[0], "table": rules[1]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('quantize = {format="int4", group_size=8}', lambda: jc.quantize("int4", 8)),
        ('quantize = {format="int4", group_size=[8, 4]}', lambda: jc.quantize("int4", (8, 4))),
        (
            'quantize = {format="uint4", symmetric=false, per="tensor", scale_dtype="bfloat16"}',
            lambda: jc.quantize("uint4", symmetric=False, per="tensor", scale_dtype="bfloat16"),
        ),
        (
            'quantize = {format="int4", group_size=5, pad=true, key=7}',
            lambda: jc.quantize("int4", 5, pad=True, key=jax.random.key(7)),
        ),
        (
            'quantize = {format="int4", bounds="mse"}',
            lambda: jc.quantize("int4", bounds=jc.bounds.mse()),
        ),
        (
            'quantize = {format="int4", bounds={percentile={percent=90}}}',
            lambda: jc.quantize("int4", bounds=jc.bounds.percentile(90)),
        ),
        (
            'quantize = {format="int4", bounds={moving_average={decay=0.5, of="entropy"}}}',
            lambda: jc.quantize(
                "int4", bounds=jc.bounds.moving_average(0.5, of=jc.bounds.entropy())
            ),
        ),
        (
            'quantize = {format="int8", activations="int8", backward={residuals="recomputed"}}',
            lambda: jc.quantize(
                "int8", activations="int8", backward=jc.backward(residuals="recomputed")
            ),
        ),
        (
            'quantize = {format="int8", activations={format="uint4", step="fixed", high=3}}',
            lambda: jc.quantize("int8", activations=jc.activations("uint4", "fixed", high=3)),
        ),
        ('lsq = {format="int4"}', lambda: jc.lsq("int4")),
        ('dorefa = {format="odd2"}', lambda: jc.dorefa("odd2")),
        (
            'progressive = {0={format="int8"}, 100={format="int2"}}',
            lambda: jc.progressive({0: jc.quantize("int8"), 100: jc.quantize("int2")}),
        ),
        ("low_rank = {energy=0.9}", lambda: jc.low_rank(energy=0.9)),
        ("low_rank = {budget={share=0.9}}", lambda: jc.low_rank(budget=jc.bytes(0.9))),
        ("low_rank = {budget={bytes=0.9}}", lambda: jc.low_rank(budget=jc.bytes(0.9))),
        ("low_rank = {budget={traffic=0.9}}", lambda: jc.low_rank(budget=jc.traffic(0.9))),
        (
            'low_rank = {budget={microseconds=9.5, chip="h100"}}',
            lambda: jc.low_rank(budget=jc.traffic(microseconds=9.5, chip="h100")),
        ),
        (
            'low_rank = {rank=2}\nquantize = {format="int8"}',
            lambda: jc.chain(jc.low_rank(rank=2), jc.quantize("int8")),
        ),
        (
            "prune = {sparsity=0.25}",
            lambda: jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.25)),
        ),
        (
            'prune = {sparsity=0.25, scope="output"}',
            lambda: jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.25), scope="output"),
        ),
        (
            "prune = {threshold=1}",
            lambda: jc.prune(jc.scores.magnitude(), threshold=1.0),
        ),
    ],
)
def test_methods_take_what_their_functions_take(text, expected, tmp_path):
    found = jc.compress({"w": W}, recipe(tmp_path, f"[[rule]]\n{text}"))
    wanted = jc.compress({"w": W}, expected())
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_budget_of_operations_asks_for_uses_and_one_share_is_given(tmp_path):
    text = "[[rule]]\nlow_rank = {budget={%s}}"
    with pytest.raises(ValueError, match="needs the operations of 'w'"):
        jc.compress({"w": W}, recipe(tmp_path, text % "flops=0.9"))
    with pytest.raises(ValueError, match=r"of one share, such as \{bytes = 0.5\}"):
        recipe(tmp_path, text % "flops=0.9, bytes=0.5")


def test_every_argument_of_every_method_has_a_form_in_files():
    """A new argument of a type that files cannot give yet fails here."""
    values = [True, 1, 1.0, "mse", [1, 1], {"format": "int8"}, {"share": 0.5}]
    for function, _ in _METHODS.values():
        if function is jc.progressive:
            continue
        hints = typing.get_type_hints(function)
        for key in inspect.signature(function).parameters:
            if key != "where":
                stub = lambda x: x
                stub.__annotations__ = {"x": hints[key]}
                assert any(_takes(stub, value) for value in values), f"{function.__name__} {key}"
    public = {name for name, f in vars(jc.bounds).items() if inspect.isfunction(f)}
    made = {name for name in public if _made_by(getattr(jc.bounds, name)) is jc.bounds.Bounds}
    assert made == set(_BOUNDS)


def _takes(function, value):
    try:
        call(function, {"x": value}, "", "")
        return True
    except ValueError:
        return False


def _made_by(function):
    return typing.get_type_hints(function).get("return")


def test_where_takes_lists_classes_and_ranks(tmp_path):
    params = {"layers": [{"kernel": W, "bias": W[0]} for _ in range(4)], "norm": {"scale": W[0]}}
    text = """
    [[rule]]
    where = ["layers/[01]/kernel", "**/scale"]
    quantize = {format = "int8"}

    [[rule]]
    where = "layers/[!2]/*"
    min_ndim = 1
    quantize = {format = "int4"}
    """
    small = jc.compress(params, recipe(tmp_path, text))
    methods = {row["path"]: row["method"] for row in jc.report(params, small)["leaves"]}
    assert methods == {
        "norm/scale": "int8",
        **{f"layers/{i}/kernel": "int8" for i in (0, 1)},
        **{f"layers/{i}/bias": "int4" for i in (0, 1, 3)},
        "layers/3/kernel": "int4",
        **{f"layers/2/{name}": "dense" for name in ("kernel", "bias")},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = 3", r"no \[\[rule\]\] table"),
        ("", r"no \[\[rule\]\] table"),
        ("[[rules]]", r"'rules' is in no rule; a recipe is a list of"),
        ("[rule]\nprune = {sparsity=0.5}", r"\[rule\] is one table, .* write \[\[rule\]\]"),
        ("[[rule]", "is not TOML"),
        (
            "[[rule]]\nwhere = '*'",
            r"rule 1 \(where='\*'\) does nothing: it needs one of auto_",
        ),
        ("[[rule]]\nwere = '*'", "rule 1: unknown key 'were'; did you mean 'where'"),
        ("[[rule]]\nwhere = 3", r"rule 1 \(where=3\): it is a glob"),
        ("[[rule]]\nwhere = []", r"rule 1 \(where=\[\]\): it is a glob"),
        ("[[rule]]\nwhere = '**x'\nlow_rank={rank=1}", r"did you mean '\*\*/\*x'"),
        ("[[rule]]\nmin_ndim = true\nlow_rank={rank=1}", "min_ndim=True: it is a rank"),
        ("[[rule]]\nquantize = 'int8'", r"quantize = 'int8': write a table, such as"),
        ("[[rule]]\nquantize = {}", r"rule 1 \(where='\*\*'\), quantize needs format"),
        ("[[rule]]\nquantize = {format='int9'}", r", quantize: unknown number format 'int9'"),
        ("[[rule]]\nquantize = {formt='int8'}", "unknown key 'formt'; did you mean 'format'"),
        ("[[rule]]\nquantize = {where='*'}", "quantize: unknown key 'where'"),
        ("[[rule]]\nprune = {}", ", prune: it needs sparsity or threshold, such as"),
        ("[[rule]]\nquantize = {format='int8', backward='i8'}", "backward: unknown number format"),
        ("[[rule]]\nprune = {sparsity=2}", ", prune: sparsity=2 is not a sparsity"),
        ("[[rule]]\nprune = {sparsity='a'}", ", prune: sparsity='a': it is a number"),
        ("[[rule]]\nlow_rank = {rank=true}", ", low_rank: rank=True: it is a whole number"),
        ("[[rule]]\nlow_rank = {rank=2.5}", ", low_rank: rank=2.5: it is a whole number"),
        (
            "[[rule]]\nwhere='**/w'\nquantize = {format='int4', symmetric='no'}",
            r"rule 1 \(where='\*\*/w'\), quantize: symmetric='no': it is true or false",
        ),
        (
            "[[rule]]\nquantize = {format='int4', group_size=true}",
            "group_size=True: it is a whole number or a list of 2 whole numbers",
        ),
        (
            "[[rule]]\nquantize = {format='int4', group_size=[true, 2]}",
            r"group_size=\[True, 2\]: it is a whole number",
        ),
        ("[[rule]]\nquantize = {format='int4', key=true}", "key=True: it is the seed of a random"),
        (
            "[[rule]]\nquantize = {format='int4', bounds=3}",
            "bounds=3: it is one of absmax, ",
        ),
        ("[[rule]]\nquantize = {format='int4', bounds='mes'}", "'mes'; did you mean 'mse'"),
        ("[[rule]]\nquantize = {format='int4', bounds='percentile'}", "percentile needs percent"),
        (
            "[[rule]]\nquantize = {format='int4', bounds={mse={least='x'}}}",
            "bounds, mse: least='x': it is a number",
        ),
        (
            "[[rule]]\nquantize = {format='int4', bounds={mse={}, entropy={}}}",
            "it is one name, such as",
        ),
        (
            "[[rule]]\nquantize = {format='int4', activations={format='int8', stp='fixed'}}",
            "activations: unknown key 'stp'; did you mean 'step'",
        ),
        ("[[rule]]\nprogressive = {now={format='int8'}}", "progressive: it maps updates to tables"),
        ("[[rule]]\nprogressive = {0={format=3}}", "progressive, 0: format=3: it is a string"),
        ("[[rule]]\nprogressive = {}", "progressive.*updates count from 0"),
        (
            "[[rule]]\nlow_rank={rank=1}\n[[rule]]\nwhere='**'\nlow_rank={rank=2}",
            r"rule 2 \(where='\*\*'\): an earlier rule has the same where",
        ),
    ],
)
def test_recipes_that_cannot_be_read_say_why(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        recipe(tmp_path, text)
    assert (
        len(str(caught.value).partition("r.toml")[2]) < 400
        and "\n" not in str(caught.value).partition(" TOML")[0]
    )
