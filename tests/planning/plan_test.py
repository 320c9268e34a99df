"""Plans say what compressing then gives, and refuse what it would refuse."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.planning.live_bytes import peak_bytes

INT4 = jc.quantize("int4", group_size=32)
SHAPE = jax.ShapeDtypeStruct


def model(params, ids):
    x = params["embed"][ids]
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]


def tree(new):
    layer = lambda: {"kernel": new(64, 64), "bias": new(64)}
    return {"embed": new(40, 64), "first": layer(), "second": layer(), "head": new(64, 40)}


RNG = np.random.default_rng(0)
PARAMS = tree(lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32))
SHAPES = tree(lambda *shape: SHAPE(shape, jnp.float32))
IDS = SHAPE((2, 3), jnp.int32)
MIXED = {
    "embed": jc.quantize("int8"),
    "first/kernel": jc.chain(jc.low_rank(rank=4), jc.quantize("int8")),
    "second/kernel": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.75)),
    "head": INT4,
}


SIMPLE = {"embed": jc.quantize("int8"), "head": INT4}


@pytest.mark.parametrize("recipe", [SIMPLE, pytest.param(MIXED, marks=pytest.mark.ci)], ids=len)
def test_a_plan_is_what_compressing_gives(recipe):
    found = jc.plan(model, SHAPES, recipe, IDS, chip="tpu v5e")
    uses = jc.uses(model, PARAMS, jnp.ones((2, 3), int))
    small = jc.compress(PARAMS, recipe, uses=uses)
    want = {row["path"]: row for row in jc.report(PARAMS, small)["leaves"]}
    for row in found["leaves"]:
        own = want[row["path"]]
        # A random copy of 64 by 64 has as many kept entries as the matrix itself.
        assert row["stored_bytes"] == own["stored_bytes"], row
        assert row["method"] == (None if own["method"] == "dense" else own["method"])
        assert row["estimated"] == (row["path"] == "second/kernel" and row["path"] in recipe)
    assert found["total"]["stored_bytes"] == jc.nbytes(small)
    rules = {row["path"]: row["rule"] for row in found["leaves"]}
    assert rules["embed"] == "embed" and rules["first/bias"] is None
    assert json.loads(json.dumps(found)) == found
    assert found == jc.plan(model, PARAMS, recipe, jnp.ones((2, 3), int), chip="tpu v5e")


def test_operations_bytes_and_times_follow_from_the_function():
    found = jc.plan(model, SHAPES, MIXED, IDS, chip="tpu v5e")
    rows = {row["path"]: row for row in found["leaves"]}
    assert rows["head"]["flops"] == 2 * 6 * 64 * 40
    assert rows["first/kernel"]["flops"] == 2 * 6 * (64 + 64) * 4
    assert rows["embed"]["moved_bytes"] == 0  # looked up
    assert rows["head"]["microseconds"] == pytest.approx(rows["head"]["stored_bytes"] / 819e3)
    assert rows["head"]["bound"] == "memory"
    ends = 6 * 4 + 6 * 40 * 4
    total = found["total"]
    assert total["moved_bytes"] == total["stored_bytes"] - rows["embed"]["stored_bytes"] + ends
    assert total["peak_bytes"] >= total["dense_bytes"] + total["stored_bytes"]
    wide = jc.plan(model, SHAPES, MIXED, SHAPE((2, 30000), jnp.int32), chip="tpu v5e")
    assert {row["path"]: row["bound"] for row in wide["leaves"]}["head"] == "arithmetic"


def test_leaves_that_stay_say_why():
    recipe = {"**/kernel": jc.quantize("int8", where="first/**")}
    found = jc.plan(lambda p, x: x @ p["first"]["kernel"], SHAPES, recipe, SHAPE((2, 64), "f4"))
    why = {row["path"]: row["skipped"] for row in found["leaves"]}
    assert why["first/kernel"] is None
    assert why["second/kernel"] == "meets no product or lookup"
    assert why["head"] == "no rule takes it"
    found = jc.plan(model, SHAPES, jc.quantize("int8", where="first/kernel"), IDS)
    why = {row["path"]: row["skipped"] for row in found["leaves"]}
    assert why["first/bias"] == "rank 1" and why["second/kernel"] == "left out by where="
    assert "left out by where=" in str(found)


def test_what_values_decide_is_unknown():
    found = jc.plan(model, SHAPES, {"head": jc.low_rank(energy=0.9)}, IDS, chip="h100")
    row = {row["path"]: row for row in found["leaves"]}["head"]
    assert row["method"] == "by values" and row["stored_bytes"] is None
    assert found["total"]["stored_bytes"] is None and found["total"]["microseconds"] is None
    str(found)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"head": jc.quantize("int4", group_size=48)}, "48"),
        ({"hed": INT4}, "head"),
        ({"head": jc.gptq("int4")}, "calibrate"),
        ({"head": jc.chain(INT4, jc.low_rank(rank=2))}, "low_rank"),
        ({"head": jc.low_rank(rank=100)}, "rank=100"),
    ],
    ids=["group", "pattern", "statistics", "order", "rank"],
)
def test_what_would_fail_later_is_refused(recipe, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jc.plan(model, SHAPES, recipe, IDS)


def test_calls_and_chips_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="did you mean 'tpu v5"):
        jc.plan(model, SHAPES, INT4, IDS, chip="tpu v5x")
    with pytest.raises(TypeError):
        jc.plan(model, SHAPES, INT4, SHAPE((2, 3), jnp.float32))


def test_statistics_may_be_given():
    stats = jc.calibrate(model, PARAMS, [jnp.ones((2, 3), int)])
    found = jc.plan(model, SHAPES, {"head": jc.gptq("int4", group_size=32)}, IDS, stats=stats)
    row = {row["path"]: row for row in found["leaves"]}["head"]
    assert row["method"] == "int4 g32" and row["call"].startswith("gptq('int4'")


def test_live_bytes_are_those_of_unfused_operations():
    x = SHAPE((1000,), jnp.float32)
    assert peak_bytes(lambda x: x + 1, x) == 8000
    # The argument, its sine and the product; and two results in between at once.
    assert peak_bytes(lambda x: (jnp.sin(x) * x).sum(), x) == 12000
    assert peak_bytes(jax.jit(lambda x: jnp.exp(jnp.sin(jnp.cos(x)))), x) == 12000
    assert peak_bytes(lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x), x) >= 8000


@pytest.mark.ci
def test_a_tree_of_eight_billion_takes_seconds_and_no_memory():
    bf16 = lambda *shape: SHAPE(shape, jnp.bfloat16)
    layer = {"q": bf16(4096, 4096), "kv": bf16(4096, 2048), "o": bf16(4096, 4096)}
    layer |= {"up": bf16(4096, 28672), "down": bf16(14336, 4096)}
    params = {"layers": [layer] * 32, "embed": bf16(128256, 4096), "head": bf16(4096, 128256)}

    def llama(params, ids):
        x = params["embed"][ids]
        for w in params["layers"]:
            kv, gate = x @ w["kv"], x @ w["up"]
            x = x + ((x @ w["q"]) * jnp.tile(kv, 2)) @ w["o"]
            x = x + (jax.nn.silu(gate[..., :14336]) * gate[..., 14336:]) @ w["down"]
        return x @ params["head"]

    begin = time.process_time()
    recipe = {"layers/**": jc.quantize("int4", group_size=128)}
    found = jc.plan(llama, params, recipe, SHAPE((1, 8), jnp.int32), chip="tpu v5e")
    assert time.process_time() - begin < 60  # some seconds on an idle machine
    assert found["total"]["size"] == 32 * 218_103_808 + 2 * 525_336_576
    weights = 32 * 218_103_808
    # Four bits, and a float32 scale for each 128 of them.
    assert found["total"]["stored_bytes"] == weights * 4.25 // 8 + 4 * 525_336_576
