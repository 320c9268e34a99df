"""Sensitivities: estimated, measured, resumed, and what is allocated by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.planning.tables import FORMATS, network, random_table

CALLS = []


def count():
    CALLS.append(1)


@pytest.mark.ci
def test_operations_and_traffic_of_factors_and_of_removed_units():
    """An MLP of 32 to 64 to 16, a table and 4 rows of data: counts by hand."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "table": jax.random.normal(keys[0], (50, 32)),
        "up": jax.random.normal(keys[1], (32, 64)),
        "down": jax.random.normal(keys[2], (64, 16)),
    }
    ids = jnp.arange(4)
    model = lambda p, ids: jax.nn.relu(p["table"][ids] @ p["up"]) @ p["down"]
    loss = lambda p, ids: jnp.mean(jnp.square(model(p, ids) - 1))
    groups = jc.find_groups(model, params, ids)
    (hidden,) = (name for name in groups if len(groups[name]) == 64)
    plan = groups.plan({hidden: range(48)})
    candidates = {
        "rank 4": jc.low_rank(rank=4, where=["up", "down"]),
        "quarter": plan.compression,
        "int8": jc.quantize("int8"),
    }
    uses = jc.uses(model, params, ids)
    find = functools.partial(jc.sensitivities, loss, params, candidates, [(ids,)], measured=0)
    table = find(uses=uses, groups=[["up", "down"]])
    cells = table.cells["down + up"]
    assert cells["dense"].running == (2 * 4 * 64 * (32 + 16), 4 * 64 * (32 + 16))
    assert cells["rank 4"].running.flops == 2 * 4 * 4 * (32 + 64 + 64 + 16)
    assert cells["rank 4"].running.moved == 4 * 4 * (32 + 64 + 64 + 16)
    assert (cells["dense"].running.flops, cells["quarter"].running.flops) == plan.flops
    # What is only looked up is not read, and multiplies nothing.
    assert table.cells["table"]["int8"].running == (0, 0)
    recipe = jc.allocate(table, jc.flops(0.3))
    assert recipe.choices["down + up"] in ("rank 4", "quarter")
    assert jc.allocate(table, jc.traffic(0.26)).choices["down + up"] != "dense"
    with pytest.raises(ValueError, match=r"does not say the operations; it takes .* uses="):
        jc.allocate(find(), jc.flops(0.3))
    with pytest.raises(ValueError, match=r"no choice fits 0\.01 of the bytes that a call reads"):
        jc.allocate(table, jc.traffic(0.01))


def test_parameters_that_matter_keep_their_bits():
    loss, params, batches = network()
    uses = jc.uses(loss, params, *batches[0])
    table = jc.sensitivities(loss, params, FORMATS, batches[:2], held_out=batches[2:], uses=uses)
    assert set(table.cells) == {"loud", "quiet"}  # The others meet no product.
    recipe = jc.allocate(table, jc.bytes(0.52))
    assert recipe.choices == {"loud": "int8", "quiet": "int2"} or (
        recipe.choices["loud"] in ("int8", "dense")
    )
    small = jc.compress(params, recipe, uses=uses)
    assert jc.nbytes(small) == recipe.bytes
    # Additive, and as measured: each was alone, and they are nearly independent here.
    got = loss(jc.materialize(small), *batches[2]) - table.loss
    assert float(got) == pytest.approx(recipe.increase, abs=0.1 * table.increase("loud", "int2"))
    for name in FORMATS:
        assert table.increase("loud", "int2") >= table.increase("quiet", name)


def test_estimates_rank_as_measurements_do():
    loss, params, batches = network()
    uses = jc.uses(loss, params, *batches[0])
    table = jc.sensitivities(loss, params, FORMATS, batches, uses=uses, measured=3)
    for cells in table.cells.values():
        names = sorted(FORMATS, key=lambda n: cells[n].estimate)
        assert names == ["int8", "int4", "int2"]
        assert cells["int2"].measured > cells["int8"].measured
    few = jc.sensitivities(loss, params, FORMATS, batches, uses=uses, measured=1)
    assert few.cells["loud"]["int8"].measured is None
    assert "~" in str(few)
    none = jc.sensitivities(loss, params, FORMATS, batches, uses=uses, seconds=-1)
    assert all(c.measured is None for c in none.cells["loud"].values() if c.bytes < 4096)
    # Scaled by what was measured for the row, estimates are of the size of measurements.
    got, want = (t.increase("loud", "int4") for t in (few, table))
    assert 0.2 < got / want < 5


@pytest.mark.ci
def test_rows_are_measured_beside_a_recipe(tmp_path):
    """Two factors of one product: an error in one costs as much as the other is large.

    A loss that compares with the dense model has no gradient there, but has one beside a recipe.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (8, 8)), "b": jax.random.normal(keys[1], (8, 8))}
    model = lambda p, x: (x @ p["a"]) * (x @ p["b"])
    x = jax.random.normal(keys[2], (64, 8))
    loss = lambda p, x: jnp.mean(jnp.square(model(p, x) - model(params, x)))
    uses, base = jc.uses(model, params, x), jc.quantize("int2")
    find = functools.partial(jc.sensitivities, loss, params, FORMATS, [(x,)], uses=uses, measured=3)
    table = find(beside=base, resume=tmp_path / "kept")
    rounded = jc.materialize(jc.compress(params, base, uses=uses))
    for row, other in (("a", "b"), ("b", "a")):
        beside = {row: params[row], other: rounded[other]}
        for name, c in FORMATS.items():
            own = jc.materialize(jc.compress(params, {row: c}, uses=uses))[row]
            want = float(loss({**beside, row: own}, x) - loss(beside, x))
            # A difference of two sums in float32.
            off = 1e-5 * float(loss(beside, x))
            assert table.cells[row][name].measured == pytest.approx(want, abs=off)
    assert table.loss == pytest.approx(0, abs=1e-9)
    assert all(table.cells["a"][name].estimate > 1e-6 for name in FORMATS)
    # What was measured beside something else is not read again.
    alone = find(resume=tmp_path / "kept")
    assert alone.cells["a"]["int8"].measured != table.cells["a"]["int8"].measured


def test_groups_share_a_choice_and_candidates_of_several_families():
    loss, params, batches = network()
    uses = jc.uses(loss, params, *batches[0])
    families = FORMATS | {
        "rank 8": jc.low_rank(rank=8),
        "half + int4": jc.chain(
            jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.quantize("int4")
        ),
        "nowhere": jc.quantize("int8", where="nowhere/*"),
    }
    together = jc.sensitivities(loss, params, families, batches, uses=uses, groups=["*"])
    (row,) = together.cells
    assert together.rows[row] == ["loud", "quiet"] and "nowhere" not in together.cells[row]
    recipe = jc.allocate(together, jc.bytes(0.45))
    small = jc.compress(params, recipe, uses=uses)
    assert type(small["loud"]) is type(small["quiet"])
    with pytest.raises(ValueError, match="'loud', as an earlier one does"):
        jc.sensitivities(loss, params, FORMATS, batches, uses=uses, groups=["*", "loud"])


def test_measurements_are_kept_and_read_again(tmp_path):
    loss, params, batches = network()
    uses = jc.uses(loss, params, *batches[0])

    def counted(params, x, y):
        jax.debug.callback(count)
        return loss(params, x, y)

    run = functools.partial(
        jc.sensitivities, counted, params, FORMATS, batches, uses=uses, resume=tmp_path / "kept"
    )
    first = run()
    jax.effects_barrier()
    counts = len(CALLS)
    again = run()
    jax.effects_barrier()
    assert again.cells == first.cells
    # Gradients and the loss before compression alone.
    assert len(CALLS) - counts == 2 * len(batches)
    with (tmp_path / "kept").open("a") as file:
        file.write('{"key": "torn')
    assert run().cells == first.cells


def test_measurements_of_other_statistics_are_not_read(tmp_path):
    loss, params, batches = network()
    uses, candidates = jc.uses(loss, params, *batches[0]), {"gptq": jc.gptq("int2", where="loud")}
    turned = [(x[:, ::-1] * jnp.arange(32), y) for x, y in batches]

    def run(seen, resume):
        stats = jc.calibrate(loss, params, seen)
        known = {"uses": uses, "stats": stats, "resume": resume}
        return jc.sensitivities(loss, params, candidates, batches, **known).cells["loud"]["gptq"]

    first, want = run(batches, tmp_path / "kept"), run(turned, None)
    assert run(turned, tmp_path / "kept") == want != first


def test_wrong_calls():
    loss, params, batches = network()
    uses = jc.uses(loss, params, *batches[0])
    with pytest.raises(ValueError, match="no candidate of"):
        jc.sensitivities(
            loss, params, {"x": jc.quantize("int8", where="nowhere/*")}, batches, uses=uses
        )
    few = {"int8": jc.quantize("int8")}
    with pytest.raises(ValueError, match="batches is empty"):
        jc.sensitivities(loss, params, few, [], uses=uses)
    with pytest.raises(ValueError, match="held_out is empty"):
        jc.sensitivities(loss, params, few, batches, held_out=[], uses=uses)
    for share in (0, 1.5, True):
        with pytest.raises(ValueError, match="share that is left"):
            jc.bytes(share)
        with pytest.raises(ValueError, match="it is a share"):
            jc.traffic(share)
    for given in ({}, {"chip": "h100"}, {"share": 0.5, "microseconds": 3}):
        with pytest.raises(ValueError, match=r"a share, or microseconds= with chip="):
            jc.traffic(**given)
    with pytest.raises(ValueError, match="above 0"):
        jc.traffic(microseconds=-1.0, chip="h100")
    for budget in (0.5, [0.5]):
        with pytest.raises(TypeError, match=r"jaxopt_compress\.bytes"):
            jc.allocate(random_table(np.random.default_rng(0)), budget)


@pytest.mark.slow
@pytest.mark.ci
def test_codebooks_ranks_and_coded_bytes_are_candidates():
    """Sizes are those of the files; of thin weights the rank is chosen, of few values the code."""
    keys = jax.random.split(jax.random.key(7), 4)
    thin = jax.random.normal(keys[0], (32, 2)) @ jax.random.normal(keys[1], (2, 32)) / 8
    few = jnp.asarray([-0.3, 0.0, 0.31, 1.0])[jax.random.randint(keys[2], (32, 32), 0, 4)]
    params = {"thin": thin, "few": few}
    model = lambda p, x: jnp.tanh(x @ p["thin"]) + x @ p["few"]
    x = jax.random.normal(keys[3], (128, 32))
    batches = [(x, model(params, x))]
    loss = lambda p, x, y: jnp.mean((model(p, x) - y) ** 2)
    candidates = {
        "share": jc.share(4, "density", centroid_dtype="float16"),
        "sums": jc.share(4, "density", vector=2, codebooks=2),
        "rank": jc.chain(jc.low_rank(rank=2), jc.quantize("int8")),
        "int8": jc.quantize("int8"),
    }
    coded = functools.partial(jc.coded_bytes, coding="ans")
    uses = jc.uses(loss, params, *batches[0])
    table = jc.sensitivities(loss, params, candidates, batches, uses=uses, measured=4, size=coded)
    for row in params:
        for name in candidates:
            small = jc.compress({row: params[row]}, candidates[name], layout="in,out")
            assert table.cells[row][name].bytes == coded(small)
    wanted = table.cells["thin"]["rank"].bytes + table.cells["few"]["share"].bytes
    recipe = jc.allocate(table, jc.bytes((table.rest + wanted + 16) / table.dense_bytes))
    assert recipe.choices == {"thin": "rank", "few": "share"}
    small = jc.compress(params, recipe, uses=uses)
    assert coded({k: small[k] for k in recipe.choices}) <= recipe.bytes
