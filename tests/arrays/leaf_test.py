"""What a new kind of compressed array gets from its decorator, and what factors offer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.arrays import CompressedArray, MaskedArray, compressed_array, map_factors
from jaxopt_compress.compression import Decision, LeafMethod, compression_of
from jaxopt_compress.storage.schema import encode
from jaxopt_compress.tree import Layout


@compressed_array(data=["rows", "columns"], static=["name"], training=["noise"])
class OuterArray(CompressedArray):
    """``rows * columns``: nothing but its class makes it a leaf."""

    rows: Any
    columns: Any
    name: str
    noise: float = 0.0

    @property
    def shape(self):
        return (self.rows.shape[0], self.columns.shape[1])

    @property
    def dtype(self):
        return self.rows.dtype

    def materialize(self):
        return self.rows * self.columns


def test_names_are_taken_once():
    with pytest.raises(ValueError, match=r"there is a compressed array QuantizedArray in jaxopt_"):

        @compressed_array(data=["codes"])
        class QuantizedArray(CompressedArray):
            codes: Any


def outer():
    rows, columns = jnp.arange(8.0)[:, None], jnp.arange(1.0, 5.0)[None]
    return OuterArray(rows, columns, "mine", noise=0.5)


def test_it_is_saved_and_loaded(tmp_path):
    jc.save(tmp_path / "c", {"w": outer()})
    back = jc.load(tmp_path / "c")["w"]
    assert type(back) is OuterArray and back.name == "mine"
    np.testing.assert_array_equal(back.materialize(), outer().materialize())
    assert back.noise == 0.0  # What only training needs is not on disk.


def test_it_is_split_like_the_dense_array():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    leaf = jc.shard({"w": outer()}, NamedSharding(mesh, P("a", "b")))["w"]
    assert leaf.rows.sharding.spec == P("a", None) and leaf.columns.sharding.spec == P(None, "b")


def test_it_runs_under_transformations():
    doubled = jax.jit(lambda x: jax.tree.map(lambda a: 2 * a, x))(outer())
    np.testing.assert_array_equal(doubled.materialize(), 4 * outer().materialize())
    y = jc.lift(lambda p, x: x @ p["w"], on_fallback="densify")({"w": outer()}, jnp.ones((2, 8)))
    np.testing.assert_array_equal(y, jnp.ones((2, 8)) @ outer().materialize())


def test_a_line_says_what_it_is():
    text = repr(outer())
    assert text == "OuterArray(outer, float32[8,4], 12 bits per weight, 48 bytes)"
    assert jc.report({"w": outer().materialize()}, {"w": outer()})["leaves"][0]["method"] == "outer"


@pytest.mark.parametrize(
    ("c", "text"),
    [
        (jc.quantize("int4", group_size=4), "QuantizedArray(int4 g4, float32[8,6], 12 bits"),
        (
            jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4"),
            "SparseArray(sparse 2:4, float32[8,6], 17 bits",
        ),
        (
            jc.chain(jc.low_rank(rank=2), jc.quantize("int8")),
            "LowRankArray(low rank 2 of int8, float32[8,6]",
        ),
        (
            jc.quantize("int8", activations="int4"),
            "InputQuantizedArray(int8 x int4, float32[8,6]",
        ),
    ],
)
def test_lines_of_all_leaves(c, text):
    small = jc.compress({"w": jnp.ones((8, 6))}, c)["w"]
    assert repr(small).startswith(text) and len(repr(small)) < 120
    seen = []
    jax.jit(lambda x: (seen.append(repr(x)), x)[1])(small)
    assert seen[0] == repr(small)
    jax.tree.map(lambda x: None, small).__repr__()
    jax.tree.map(lambda x: P(), small).__repr__()


@pytest.mark.parametrize(
    "leaf",
    [
        MaskedArray(jnp.ones((4, 2)), jnp.ones((4, 2), bool)),
        jc.quantize("int8", activations="int8").view(
            {"w": jnp.ones((4, 2))},
            jc.quantize("int8", activations="int8").init({"w": jnp.ones((4, 2))}),
        )["w"],
    ],
    ids=["masked", "fake"],
)
def test_what_only_exists_in_training_is_not_saved(leaf):
    with pytest.raises(TypeError, match=r"cannot save 'a/w.*checkpoints know .*not (Masked|Fake)"):
        encode({"a": {"w": leaf}})


def test_training_fields_of_activations_are_not_on_disk():
    small = jc.compress({"w": jnp.ones((8, 6))}, jc.quantize("int8", activations="int8"))
    node = encode(small).node["dict"][0][1]
    assert set(node["static"]) == {"format"}


def test_masks_of_all_leaves():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
    prune = jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5))
    want = prune.init({"w": w}).leaves["w"].mask
    for c in (prune, jc.chain(prune, jc.quantize("int8"))):
        np.testing.assert_array_equal(jc.compress({"w": w}, c)["w"].kept(), want)
    assert jc.compress({"w": w}, jc.quantize("int8"))["w"].kept() is None
    negative = MaskedArray(-jnp.ones((2, 2)), jnp.zeros((2, 2), bool)).materialize()
    assert not np.signbit(np.asarray(negative)).any()


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


SIZES = jnp.array([1.0, 100.0, 0.01])[:, None, None]
FACTORED = jc.compress({"w": normal(0, 3, 8, 6) * SIZES}, jc.low_rank(rank=2, where="w"))["w"]


def test_factors_are_mapped_by_name():
    seen = []
    same = map_factors(lambda path, x: (seen.append(path), x)[1], "w", FACTORED)
    assert same is FACTORED and seen == ["w/u", "w/v"]
    twice = map_factors(lambda path, x: 2 * x, "w", FACTORED)
    np.testing.assert_allclose(twice.materialize(), 4 * FACTORED.materialize(), rtol=1e-6)
    assert map_factors(lambda path, x: path, "w", jnp.ones(2)) == "w"


@pytest.mark.parametrize("turned", [False, True])
def test_statistics_reach_factors(turned):
    """Entries of a stack of very different sizes, each with inputs of its own."""
    k = 6 if turned else 8
    x = normal(1, 3, 50, k) * jnp.flip(SIZES)
    equation = "exk,enk->exn" if turned else "exk,ekn->exn"
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    params = {"w": FACTORED.materialize()}
    stats, uses = jc.calibrate(fn, params, [x]), jc.uses(fn, params, x)
    seen = {}

    def init(parameter):
        seen[parameter.path] = parameter
        return Decision(None)

    c = compression_of(LeafMethod(lambda parameter: None, init), "w")
    c.init({"w": FACTORED}, uses=uses, stats=stats)
    first, second = ("w/v", "w/u") if turned else ("w/u", "w/v")
    u, v = np.asarray(FACTORED.u), np.asarray(FACTORED.v)
    hidden = np.asarray(x) @ (np.swapaxes(v, -2, -1) if turned else u)
    moment = lambda y: np.einsum("exi,exj->eij", y, y) / 50
    for path, y in ((first, np.asarray(x)), (second, hidden)):
        got = seen[path].stats
        for e in range(3):
            want = moment(y)[e]
            top = np.abs(want).max()
            np.testing.assert_allclose(got.second_moment[e] / top, want / top, atol=1e-5)
            mean = y.mean(1)[e]
            np.testing.assert_allclose(got.mean[e], mean, atol=1e-5 * np.abs(y[e]).max())
        k_of = seen[path].matrix().shape[-2]
        assert got.second_moment.shape == (3, k_of, k_of)
    assert seen[first].stats.has("ranges") and not seen[second].stats.has("ranges")
    with pytest.raises(ValueError, match="do not follow"):
        _ = seen[second].stats.mean_magnitude
    assert {p.layout for p in seen.values()} == (
        {Layout((-1,), (-2,), (-3,))} if turned else {Layout((-2,), (-1,), (-3,))}
    )


def test_fisher_values_are_of_the_whole_parameter():
    w = jc.compress({"w": normal(0, 8, 6)}, jc.low_rank(rank=2))["w"]
    fn = lambda p, x: jnp.sum((x @ p["w"]) ** 2)
    taken = (jc.measures.moments(), jc.measures.fisher())
    stats = jc.calibrate(fn, {"w": w.materialize()}, [normal(1, 5, 8)], measures=taken)
    assert stats["w"][0].has("fisher")
    seen = {}

    def init(parameter):
        seen[parameter.path] = parameter.stats
        return Decision(None)

    compression_of(LeafMethod(lambda parameter: None, init), "w").init({"w": w}, stats=stats)
    assert [s.has("fisher") for s in seen.values()] == [False, False]
    assert [s.second_moment.shape for s in seen.values()] == [(8, 8), (2, 2)]


@pytest.mark.parametrize("name", ["int8", "int3", "float8_e4m3fn", "sparse", "2:4"])
def test_codes_that_were_computed_with_are_refused(name):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    half, pattern = jc.schedules.constant(0.5), name if ":" in name else None
    prune = jc.prune(jc.scores.magnitude(), half, pattern=pattern)
    small = jc.compress(params, prune if name in ("sparse", "2:4") else jc.quantize(name))
    wrong = jax.tree.map(lambda x: 1.0 * x.astype("float32"), small)
    for use in (jc.materialize, lambda p: jc.lift(lambda p, x: x @ p["w"])(p, jnp.ones((2, 8)))):
        with pytest.raises(TypeError, match=r"of shape .*map_dense\(fn, tree\)"):
            use(wrong)
    doubled = jc.map_dense(lambda x: 2 * x, small)
    np.testing.assert_array_equal(doubled["w"], 2 * small["w"].materialize())


def test_notebooks_show_one_line():
    """By Treescope, too: the arrays are shown when the line is unfolded."""
    treescope = pytest.importorskip("treescope")
    small = jc.compress({"w": jnp.ones((64, 32))}, jc.quantize("int4", group_size=16))
    text = treescope.render_to_text(small)
    assert "'w': QuantizedArray(int4 g16, float32[64,32], 6 bits per weight, 1,536 bytes)" in text
    assert text.count("\n") == 2
