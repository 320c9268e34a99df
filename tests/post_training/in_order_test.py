"""Layer after layer: statistics behind compressed layers, resuming, and what is refused."""

import functools
import gc
import os
import signal
import subprocess
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import Decision, LeafMethod, LeafState, NeedsStats, compression_of
from jaxopt_compress.lift.lockstep import WholeWarning
from jaxopt_compress.post_training.fingerprint import fingerprint
from tests.compression.laws import assert_same_bits
from tests.models import CASES as MODELS


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


D = 8
BATCHES = [normal(100 + i, 6, D) for i in range(3)]
SCALES = jnp.array([1.0, 0.1, 10.0, 3.0])


def layers(params, x):
    """Unrolled, from a list."""
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return x @ params["out"]


def indexed(params, x):
    """Unrolled, from a stack."""
    for i in range(len(SCALES)):
        x = jnp.tanh(x @ params["w"][i])
    return x @ params["out"]


def scanned(params, x):
    """Scanned and rematerialized, in another dtype, reversed."""

    @jax.checkpoint
    def body(x, w):
        return jnp.tanh(x @ w.astype(x.dtype)), jnp.sum(x)

    x, sums = jax.lax.scan(body, x, params["w"], reverse=True)
    return x @ params["out"] + sums.sum()


def experts(params, x):
    """Each expert on inputs of its own."""
    x = jnp.stack([x, 10 * x, 0.1 * x, -x])
    return jnp.tanh(jnp.einsum("end,edf->enf", x, params["w"])).sum(0) @ params["out"]


def transposed(params, x):
    """[out, in] weights inside of jit, beside a table that is tied to the last product."""
    hidden = jax.jit(lambda w, x: jnp.tanh(x @ w.T))(params["w"][0], x)
    return (hidden + params["out"][:, jnp.arange(6)].T) @ params["out"]


def chosen(params, x):
    """Each row by an expert of its choice, by all forms of a lookup."""
    ids = jnp.argmax(x[:, :4], -1)
    x = jnp.einsum("bd,bdf->bf", x, params["w"][ids].transpose(0, 2, 1).mT)
    x = jax.vmap(lambda x, i: jnp.tanh(x @ params["v"][i]))(x, ids)
    return x @ params["u"][ids[0]] @ params["out"]


STACK = normal(0, 4, D, D) * SCALES[:, None, None]
CASES = {
    "layers": (layers, {"w": list(STACK), "out": normal(1, D, D)}),
    "indexed": (indexed, {"w": STACK, "out": normal(1, D, D)}),
    "scanned": (scanned, {"w": STACK, "out": normal(1, D, D)}),
    "experts": (experts, {"w": STACK, "out": normal(1, D, D)}),
    "chosen": (
        chosen,
        {"w": STACK, "v": STACK + 0.5, "u": STACK.mT - 0.5, "out": normal(1, D, D)},
    ),
    "transposed": (transposed, {"w": list(STACK), "out": normal(1, D, D)}),
}
GROUPS = jc.quantize("int3", group_size=4)
RECIPES = {
    "int3": GROUPS,
    "pruned": {
        "out": jc.quantize("int8"),
        "**": jc.chain(
            jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.quantize("int4")
        ),
    },
}


def in_order(name, recipe, **given):
    fn, params = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return jc.compress_in_order(fn, params, recipe, BATCHES, progress=False, **given)


@pytest.mark.slow
@pytest.mark.fast("layers-int3", "indexed-pruned", "scanned-pruned", "experts-int3", "chosen-int3")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_methods_without_data_give_what_they_give_at_once(name, recipe):
    """Bit for bit, stacks of entries decided one by one included."""
    fn, params = CASES[name]
    uses = jc.uses(fn, params, BATCHES[0])
    want = jc.compress(params, RECIPES[recipe], uses=uses)
    assert_same_bits(in_order(name, RECIPES[recipe]), want)


def recording(seen: dict, where=None) -> jc.Compression:
    """Rounds to integers, and keeps the statistics that it got."""

    def init(parameter):
        if not isinstance(parameter.value, jax.core.Tracer):
            seen.setdefault(parameter.path, []).append(parameter.stats)
        return Decision(_Rounded(parameter.value.ndim))

    def check(parameter):
        if parameter.stats is None:
            raise NeedsStats(f"no statistics for {parameter.path}")

    return compression_of(LeafMethod(check, init), where)


@jax.tree_util.register_static
class _Rounded(LeafState):
    kind = "rounded"

    def __init__(self, ndim):
        self.ndim = ndim

    def __hash__(self):
        return self.ndim

    def __eq__(self, other):
        return type(self) is type(other) and self.ndim == other.ndim

    def apply(self, w, learned):
        return jnp.round(w)

    def compress(self, w, learned, path):
        return jnp.round(w)


@pytest.mark.parametrize("name", ["layers", "indexed", "scanned", "experts"])
def test_each_layer_is_calibrated_behind_the_compressed_ones(name):
    """By definition: with the layers before it compressed, `calibrate` finds the same."""
    fn, params = CASES[name]
    seen = {}
    small = jc.compress_in_order(fn, params, recording(seen), BATCHES, progress=False)
    rounded = jax.tree.map(jnp.round, params)
    jax.tree.map(np.testing.assert_array_equal, small, rounded)
    stacked = not isinstance(params["w"], list)
    assert len(seen["w" if stacked else "w/0"]) == (1 if not stacked or name == "experts" else 4)
    for t in range(4):
        now = jax.tree.map(lambda x: x, params)
        before = range(t + 1, 4) if name == "scanned" else range(t)
        for i in before if name != "experts" else ():
            if stacked:
                now["w"] = now["w"].at[i].set(rounded["w"][i])
            else:
                now["w"][i] = rounded["w"][i]
        path = "w" if stacked else f"w/{t}"
        want = jc.calibrate(fn, now, BATCHES, where=path)[path][0]
        own = seen[path]
        if name == "experts":
            got = jax.tree.map(lambda x, t=t: x[t], own[0])
        else:
            place = 3 - t if name == "scanned" else t
            got = jax.tree.map(lambda x: x[0], own[place]) if stacked else own[0]
        want = jax.tree.map(lambda x, t=t: x[t], want) if stacked else want
        for what in ("second_moment", "mean_magnitude", "low", "high", "rows"):
            a, b = (getattr(s, what) for s in (got, want))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))
    last = jc.calibrate(fn, {**rounded, "out": params["out"]}, BATCHES, where="out")["out"][0]
    np.testing.assert_allclose(seen["out"][0].second_moment, last.second_moment, rtol=1e-4)


@pytest.mark.parametrize("path", ["w", "v", "u", "out"])
def test_entries_that_data_choose_are_calibrated_apart(path):
    """As above: with the parameters before it compressed, `calibrate` finds the same."""
    fn, params = CASES["chosen"]
    seen = {}
    jc.compress_in_order(fn, params, recording(seen), BATCHES, progress=False)
    before = ["w", "v", "u", "out"]
    before = before[: before.index(path)]
    now = {k: jnp.round(v) if k in before else v for k, v in params.items()}
    (want,) = jc.calibrate(fn, now, BATCHES, where=path)[path]
    (got,) = seen[path]
    assert got.rows.shape == params[path].shape[:-2]
    for what in ("second_moment", "mean_magnitude", "low", "high", "rows"):
        a, b = (getattr(s, what) for s in (got, want))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        h = nn.Dense(16)(nn.LayerNorm()(x))
        return x + nn.Dense(D)(nn.gelu(h)), None


class Net(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(16, D)
        x = embed(ids)
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 4}
            x, _ = nn.scan(nn.remat(Block), **axes)()(x, None)
        else:
            for _ in range(4):
                x, _ = Block()(x, None)
        return embed.attend(nn.LayerNorm()(x))


@pytest.mark.slow
@pytest.mark.fast("True")
@pytest.mark.parametrize("scan", [True, False])
def test_a_transformer_of_linen(scan, capsys):
    net = Net(scan)
    ids = [jnp.asarray(np.random.default_rng(i).integers(0, 16, (2, 5))) for i in range(3)]
    params = net.init(jax.random.key(0), ids[0])
    recipe = {"**/embedding": jc.quantize("int8"), "**/kernel": jc.quantize("int4")}
    uses = jc.uses(net.apply, params, ids[0])
    small = jc.compress_in_order(net.apply, params, recipe, ids)
    assert_same_bits(small, jc.compress(params, recipe, uses=uses))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (6 * 4 + 1)  # The table that is tied to the head comes last.
    assert "embedding" in lines[-1]


def test_equal_layers_share_programs():
    from jaxopt_compress.lift.lockstep import march
    from jaxopt_compress.lift.lockstep.values import Each

    def pieces(depth):
        fn = lambda ws, x: layers({"w": ws[:-1], "out": ws[-1]}, x)
        ws = [normal(i, D, D) for i in range(depth + 1)]
        closed = jax.make_jaxpr(fn)(ws, BATCHES[0])
        args = [(str(i), w) for i, w in enumerate(ws)] + [Each(BATCHES)]
        names = {str(i) for i in range(depth + 1)}
        decide = lambda path, index, w, stats: (stats(), w)[1]
        results, made = march(closed, args, names, decide, (3, 0), (jc.measures.ranges(),))
        np.testing.assert_allclose(results[0].values[2], fn(ws, BATCHES[2]), rtol=1e-6)
        return len(made)

    assert pieces(3) == pieces(9) <= 3


def test_held_out_statistics_choose():
    fn, params = CASES["scanned"]
    more = [5 * x for x in BATCHES]
    best = jc.best_of(jc.quantize("int2"), jc.quantize("int5"))
    small = jc.compress_in_order(fn, params, best, BATCHES, held_out=more, progress=False)
    assert small["w"].format == small["out"].format == "int5"
    with pytest.raises(ValueError, match="no held-out statistics"):
        jc.compress_in_order(fn, params, best, BATCHES, progress=False)


@pytest.mark.fast("int3-layers", "pruned-scanned")
@pytest.mark.parametrize("name", ["layers", "scanned"])
@pytest.mark.parametrize("recipe", ["int3", "pruned"])
def test_a_run_goes_on_where_it_was_interrupted(name, recipe, tmp_path, monkeypatch):
    from jaxopt_compress.post_training import decided

    whole = in_order(name, RECIPES[recipe])
    keep, left = decided._keep, [2]

    def interrupted(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        keep(*args)

    monkeypatch.setattr(decided, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_order(name, RECIPES[recipe], resume=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("0*"))) == 2
    monkeypatch.setattr(decided, "_keep", keep)
    again = in_order(name, RECIPES[recipe], resume=tmp_path / "run")
    assert_same_bits(again, whole)
    assert len(list((tmp_path / "run").glob("0*"))) == 5
    fn, params = CASES[name]
    other = jc.quantize("int3", group_size=2)
    more = jax.tree.map(lambda w: w + 1, params)
    twice = lambda p, x: 2 * fn(p, x)
    for given in (
        (fn, params, RECIPES[recipe], BATCHES[:2]),
        (fn, params, other, BATCHES),
        (fn, more, RECIPES[recipe], BATCHES),
        (twice, params, RECIPES[recipe], BATCHES),
    ):
        with pytest.raises(ValueError, match="another function or recipe, or other parameters"):
            jc.compress_in_order(*given, resume=tmp_path / "run", progress=False)


def test_recipes_are_told_apart_by_all_their_arguments():
    """Also by what scores close over, and by candidates and ranks that are chosen by values."""
    constant = jc.schedules.constant(0.5)

    def scored(seed):
        default = normal(seed, D, D)
        return jc.prune(lambda p, *, a=default: jnp.abs(a), constant)

    def closed(seed):
        a = normal(seed, D, D)
        return jc.prune(lambda p: jnp.abs(a), constant)

    recipes = [
        jc.quantize("int4"),
        jc.quantize("int4", bounds=jc.bounds.mse()),
        jc.quantize("int4", bounds=jc.bounds.percentile(99.0)),
        jc.quantize("int4", bounds=jc.bounds.percentile(99.9)),
        {"*": jc.quantize("int4")},
        jc.low_rank(energy=0.5),
        jc.low_rank(energy=0.99),
        jc.best_of(jc.quantize("int4"), jc.low_rank(rank=1)),
        jc.best_of(jc.quantize("int8"), jc.low_rank(rank=2)),
        scored(1),
        scored(2),
        closed(1),
        closed(2),
        jc.prune(jc.scores.magnitude(), constant),
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.4)),
        jc.gptq("int4"),
        jc.gptq("int4", damping=1.0),
        jc.gptq("int4", act_order=False),
        jc.auto_round("int4", steps=5),
        jc.auto_round("int4", steps=500),
        functools.partial(closed, 1),
        functools.partial(closed, 2),
        [[1], 2],
        [[1, 2]],
    ]
    marks = [fingerprint(r) for r in recipes]
    assert len(set(marks)) == len(recipes)
    again = [closed(1), jc.low_rank(energy=0.5), jc.quantize("int4", bounds=jc.bounds.mse())]
    assert [fingerprint(r) for r in again] == [marks[11], marks[5], marks[1]]


@pytest.mark.ci
def test_entries_that_do_not_fit_together_are_decided_again_from_a_folder(tmp_path):
    """Layers of ranks 2, 5 and 9 have no common stack; the decision about all needs statistics."""
    thin = [normal(i, 16, r) @ normal(9 + i, r, 16) for i, r in enumerate((2, 5, 9))]
    params = {"w": jnp.stack(thin)}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    c, batches = jc.low_rank(energy=0.9, whiten=True), [normal(5, 64, 16)]
    run = lambda: jc.compress_in_order(fn, params, c, batches, resume=tmp_path, progress=False)
    first, again = run(), run()
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(first), jc.materialize(again))


def test_numbers_in_batches_are_those_of_each_batch():
    fn = lambda p, x, m: (x * m) @ p["w"]
    params = {"w": normal(0, D, D)}
    c = jc.quantize("int8", activations=jc.activations("int8", "calibrated"))
    batches = [(BATCHES[0], 1.0), (BATCHES[0], 100.0)]
    small = jc.compress_in_order(fn, params, c, batches, progress=False)
    assert_same_bits(small, jc.compress(params, c, stats=jc.calibrate(fn, params, batches)))
    static = lambda p, x, flag: x @ p["w"] if flag == "on" else x
    small = jc.compress_in_order(
        static, params, GROUPS, [(x, "on") for x in BATCHES], progress=False
    )
    assert isinstance(small["w"], jc.QuantizedArray)
    with pytest.raises(ValueError, match="batch 1 has the shapes"):
        jc.compress_in_order(static, params, GROUPS, [(BATCHES[0], "on"), (BATCHES[0], "off")])
    with pytest.raises(TypeError, match=r"batches is one array; .* such as \[x\]"):
        jc.compress_in_order(lambda p, x: x @ p["w"], params, GROUPS, BATCHES[0])


def test_compressed_leaves_are_not_compressed_again_in_silence():
    fn, params = CASES["layers"]
    small = jc.compress(params, jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)))
    with pytest.raises(TypeError, match=r"'out' of shape \(8, 8\) is a SparseArray already"):
        jc.compress_in_order(fn, small, {"out": jc.quantize("int4")}, BATCHES)
    some = {**params, "out": small["out"]}
    done = jc.compress_in_order(fn, some, {"w/*": GROUPS}, BATCHES, progress=False)
    assert isinstance(done["out"], jc.SparseArray)


def test_an_empty_stack():
    fn = lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["s"])[0] @ p["w"]
    params = {"s": jnp.zeros((0, D, D)), "w": normal(0, D, D)}
    small = jc.compress_in_order(fn, params, {"w": GROUPS}, BATCHES, progress=False)
    assert_same_bits(small["w"], jc.compress(params, {"w": GROUPS})["w"])


def test_values_may_wait_on_the_host():
    assert_same_bits(in_order("scanned", GROUPS, offload=True), in_order("scanned", GROUPS))


def recurrent(params, x):
    """One weight in every iteration."""
    step = lambda h, x: (jnp.tanh(x @ params["in"] + h @ params["w"]), None)
    return jax.lax.scan(step, jnp.zeros((D,)), x)[0] @ params["out"]


def branch(params, x):
    """A weight in a branch."""
    wide = jnp.sum(x) > -1e9
    return jax.lax.cond(wide, lambda: x @ params["w"], lambda: x) @ params["out"]


@pytest.mark.parametrize(("fn", "primitive"), [(recurrent, "scan"), (branch, "cond")])
def test_what_cannot_be_walked_is_calibrated_as_a_whole_and_says_so(fn, primitive):
    params = {k: normal(i, D, D) for i, k in enumerate(("in", "w", "out"))}
    seen = {}
    if fn is branch:
        del params["in"]
    with pytest.warns(WholeWarning, match=f"'{primitive}' is calibrated as a whole, at .*: .*w"):
        jc.compress_in_order(fn, params, recording(seen), BATCHES, progress=False)
    want = jc.calibrate(fn, params, BATCHES, where="w")["w"][0]
    np.testing.assert_allclose(seen["w"][0].second_moment, want.second_moment, rtol=1e-5)
    rounded = {**jax.tree.map(jnp.round, params), "out": params["out"]}
    want = jc.calibrate(fn, rounded, BATCHES, where="out")["out"][0]
    np.testing.assert_allclose(seen["out"][0].second_moment, want.second_moment, rtol=1e-5)


def test_tables_are_compressed_before_they_are_looked_up():
    """So that later layers see their error."""
    params = {"table": 3 * normal(0, 9, D), "w": normal(1, D, D)}
    fn = lambda p, i: p["table"][i] @ p["w"]
    seen = {}
    recipe = {"table": jc.quantize("int2"), "w": recording(seen)}
    ids = [jnp.arange(9)]
    small = jc.compress_in_order(fn, params, recipe, ids, progress=False)
    x = jc.materialize(small)["table"]
    np.testing.assert_allclose(seen["w"][0].second_moment, x.T @ x / 9, rtol=1e-5, atol=1e-6)


def test_errors_come_before_anything_is_computed():
    fn, params = CASES["layers"]
    ran = []
    traced = lambda p, x: (jax.debug.callback(lambda: ran.append(1)), fn(p, x))[1]
    bad = {"w/*": GROUPS, "out": jc.quantize("int4", group_size=3)}
    with pytest.raises(ValueError, match=r"group_size=3 .*'out' of shape \(8, 8\)"):
        jc.compress_in_order(traced, params, bad, BATCHES)
    with pytest.raises(ValueError, match="'v/\\*' matches no leaf"):
        jc.compress_in_order(traced, params, {"v/*": GROUPS}, BATCHES)
    with pytest.raises(ValueError, match="at least one batch"):
        jc.compress_in_order(traced, params, GROUPS, [])
    with pytest.raises(ValueError, match="batch 1 has the shapes"):
        jc.compress_in_order(traced, params, GROUPS, [BATCHES[0], BATCHES[1][:2]])
    assert not ran


def test_methods_that_need_data_name_what_meets_none():
    params = {"w": normal(0, D, D), "unused": normal(1, D, D)}
    with pytest.raises(NeedsStats, match="no statistics for unused"):
        jc.compress_in_order(
            lambda p, x: x @ p["w"], params, recording({}, ["w", "unused"]), BATCHES
        )


# One of each kind of walk; the others are like one of them.
WALKS = (
    "einsum_experts",
    "concatenate_outputs",
    "conv_grouped",
    "ragged_dot",
    "vmap_models",
    "take",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if c.name in WALKS else pytest.mark.slow) for c in MODELS],
)
def test_any_function(case):
    fn, params, args = case.make()
    c = jc.quantize("int8")
    want = jc.compress(params, c, uses=jc.uses(fn, params, *args))
    assert_same_bits(jc.compress_in_order(fn, params, c, [tuple(args)], progress=False), want)


def test_places_of_the_recipe_hold_for_the_whole_tree():
    """A list of globs, and elements of a chain that choose different parameters."""
    fn, params = CASES["layers"]
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), where="out")
    c = jc.chain(prune, jc.quantize("int4", where=["w/0", "w/2", "out"]))
    small = jc.compress_in_order(fn, params, c, BATCHES, progress=False)
    kinds = [type(x).__name__ for x in (*small["w"], small["out"].codes)]
    assert kinds == ["QuantizedArray", "ArrayImpl", "QuantizedArray", "ArrayImpl", "SparseArray"]
    with pytest.raises(ValueError, match="'w/9' matches no leaf"):
        jc.compress_in_order(
            fn, params, jc.quantize("int4", where=["w/0", "w/9"]), BATCHES, progress=False
        )


KILLED = """
import sys, jax.numpy as jnp, numpy as np
import jaxopt_compress as jc
from jaxopt_compress.post_training import decided

def dying(place, name, leaf, keep=decided._keep):
    keep(place, name, leaf)
    if len(list(place.parent.glob("0*"))) == int(sys.argv[3]):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

decided._keep = dying
w = [jnp.asarray(np.random.default_rng(i).standard_normal((8, 8)), jnp.float32) for i in range(4)]
def fn(w, x):
    for each in w:
        x = jnp.tanh(x @ each)
    return x
small = jc.compress_in_order(
    fn, w, eval(sys.argv[1]), [x + 1 for x in w[:2]], resume=sys.argv[2], progress=False
)
jc.save(sys.argv[4], small)
"""


RESUMED = {
    "quantize": 'jc.quantize("int3", activations=jc.activations("int4", "calibrated"))',
    "gptq": 'jc.gptq("int3", group_size=4, symmetric=False)',
    "auto_round": 'jc.auto_round("int3", steps=20)',
    "auto_round, relaxed": 'jc.auto_round("int3", method="relaxed", steps=20)',
    "awq": 'jc.awq("int3", group_size=4)',
    "hqq": 'jc.hqq("int3", symmetric=False)',
    "smooth_quant": 'jc.smooth_quant(activations=jc.activations("int8", "calibrated"))',
    "sparse_gpt, gptq": 'jc.chain(jc.sparse_gpt(0.5, "2:4"), jc.gptq("int4"))',
    "prune, reconstruct": (
        "jc.chain(jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.reconstruct())"
    ),
    "low_rank_correction": 'jc.low_rank_correction(jc.gptq("int3"), 2, whiten=True)',
}


@pytest.mark.slow
@pytest.mark.parametrize("method", RESUMED)
def test_killed_processes_resume_to_the_same_bits(method, tmp_path):
    def run(folder, at, out):
        given = [
            *(sys.executable, "-c", KILLED, RESUMED[method]),
            *(tmp_path / folder, str(at), tmp_path / out),
        ]
        return subprocess.run(given, env={**os.environ, "JAX_PLATFORMS": "cpu"}).returncode

    assert run("whole", 99, "want") == 0
    for at in (1, 3):
        assert run("run", at, "got") == -signal.SIGKILL
    assert run("run", 99, "got") == 0
    assert_same_bits(jc.load(tmp_path / "got"), jc.load(tmp_path / "want"))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_memory_is_that_of_one_cut(scan):
    """What lives on the device does not grow with the layers that are decided."""
    layers, width = 8, 32
    weights = [normal(i, width, width) / 6 for i in range(layers)]
    batches = [normal(50 + i, 128, width) for i in range(3)]

    def fn(params, x):
        if scan:
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) + x, None), x, params["w"])[0]
        for w in params["w"]:
            x = jnp.tanh(x @ w) + x
        return x

    live = []

    def init(parameter):
        if not isinstance(parameter.value, jax.core.Tracer):
            gc.collect()
            live.append(sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted()))
        return Decision(_Rounded(parameter.value.ndim))

    params = {"w": jnp.stack(weights) if scan else weights}
    recipe = compression_of(LeafMethod(lambda parameter: None, init), None)
    jc.compress_in_order(fn, params, recipe, batches, progress=False)
    assert len(live) == layers
    activations = sum(x.nbytes for x in batches)
    moments = width * (width + 8) * 4 * 2
    decided = sum(w.nbytes for w in weights)
    # The activation before a layer for each batch, its statistics, and the decided weights; of a
    # stack both as they are used and as they are returned.
    assert max(live) - live[0] <= activations + moments + (2 if scan else 1) * decided
