"""Layer after layer: what comes out of a walk, what it takes, and what is refused."""

import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.compression import Decision, LeafMethod, NeedsStats, compression_of
from tests.compression.laws import assert_same_bits
from tests.models import CASES as MODELS
from tests.post_training.layers import (
    BATCHES,
    CASES,
    GROUPS,
    RECIPES,
    D,
    Rounded,
    in_order,
    layers,
    normal,
    recording,
)


@pytest.mark.ci
@pytest.mark.fast("layers-int3", "indexed-pruned", "scanned-pruned", "experts-int3", "chosen-int3")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_methods_without_data_give_what_they_give_at_once(name, recipe):
    """Bit for bit, stacks of entries decided one by one included."""
    fn, params = CASES[name]
    uses = jc.uses(fn, params, BATCHES[0])
    want = jc.compress(params, RECIPES[recipe], uses=uses)
    assert_same_bits(in_order(name, RECIPES[recipe]), want)


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


@pytest.mark.ci
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
        return Decision(Rounded(parameter.value.ndim))

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
