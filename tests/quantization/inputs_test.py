"""Learned steps, offsets and clipping values of activations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from tests.quantization.cases import assert_same_bits
from tests.quantization.learned import X, knowing, mlp, mlp_params, steady, train, views

# A weight of 1 shows an activation as the product sees it.
EYE = {"w": jnp.eye(64)}
dot = lambda params, x: x @ params["w"]


def test_first_steps():
    x, params = steady(0, 100, 8), {"w": steady(1, 8, 4)}
    signed, rectified = (jc.calibrate(dot, params, [x]) for x in (x, jnp.abs(x)))
    own = lambda c, stats: c.init(params, stats=stats).learned["w"]["input"]
    step = own(jc.lsq("int4", activations=jc.activations("uint4", "learned")), rectified)["scale"]
    np.testing.assert_allclose(step, [[2 * jnp.abs(x).mean() / 15**0.5]], rtol=1e-5)
    four = jc.lsq("int4", activations=jc.activations("int4", "learned"))
    want = [[2 * jnp.abs(x).mean() / 7**0.5]]
    np.testing.assert_allclose(own(four, signed)["scale"], want, rtol=1e-5)
    few = jc.calibrate(dot, params, [x], measures=(jc.measures.ranges(),))
    with pytest.raises(ValueError, match=r"measures=\(jc.measures.means\(\)"):
        own(four, few)
    both = own(jc.lsq("int4", activations=jc.activations("uint4", "learned", offset=True)), signed)
    np.testing.assert_allclose(both["scale"], [[(x.max() - x.min()) / 15]], rtol=1e-6)
    np.testing.assert_allclose(both["offset"], [[x.min()]], rtol=1e-6)
    np.testing.assert_array_equal(
        own(jc.quantize("int4", activations=jc.activations("uint4", "clipped")), signed)["alpha"],
        [[x.max()]],
    )


METHODS = {
    "lsq": jc.lsq("int4", activations=jc.activations("uint4", "learned")),
    "lsq+": jc.lsq(
        "int4", per="tensor", activations=jc.activations("uint4", "learned", offset=True)
    ),
    "pact+dorefa": jc.dorefa("odd3", activations=jc.activations("uint4", "clipped", high=1.5)),
}


@pytest.mark.ci
@pytest.mark.parametrize("name", ["lsq+", "pact+dorefa"])
def test_training(name):
    """The loss falls, every learned part moves, and what is stored is what was trained."""
    params, x = mlp_params(), jnp.abs(steady(9, 64, 8))
    c = knowing(METHODS[name], jc.calibrate(mlp, params, [x]))
    tx = jc.compressed_training(optax.adam(1e-2), c, learned=optax.adam(3e-3))
    first = tx.init(params)
    params, state, losses = train(c, tx, first, params, x, mlp(mlp_params(7), x))
    assert losses[-1] < 0.6 * losses[0], losses[::13]
    before, after = (jax.tree.leaves(s.compression.learned) for s in (first, state))
    assert before
    for a, b in zip(before, after, strict=True):
        assert (np.asarray(a) != np.asarray(b)).any()
    small = jc.compress(params, c, state=state)

    @jax.jit
    def programs(params, state, small):
        """View, dense forms, outputs, and both modes of differentiation."""
        view, run = c.view(params, state), jc.lift(mlp)
        held, rest = jc.partition(view)
        fn = lambda held: run(jc.combine(held, rest), x).sum()
        pushed = jax.jvp(fn, (held,), (jax.tree.map(jnp.ones_like, held),))[1]
        back = sum(jnp.sum(g) for g in jax.tree.leaves(jax.grad(fn)(held)))
        dense = [jc.materialize(tree) for tree in (view, small)]
        dense.append(c.apply(params, state.compression))
        return view, dense, (run(view, x), run(small, x)), (pushed, back)

    view, dense, outputs, slopes = programs(params, state, small)
    assert_same_bits(dense[0], dense[1])
    assert_same_bits(dense[2], dense[1])
    for path in ("a", "b"):
        assert_same_bits(small[path]["w"].scale, view[path]["w"].scale, "steps of activations")
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*slopes, rtol=1e-3)
    dots = str(jax.make_jaxpr(jc.lift(mlp))(small, x))
    assert dots.count("preferred_element_type=int32") >= 2
    assert "preferred_element_type=float32" not in dots


def test_offset_beside_the_border_of_a_convolution():
    """What a convolution pads with is 0, not the offset."""
    x, kernel = steady(0, 2, 6, 6, 3), steady(1, 3, 3, 3, 4)
    conv = lambda params, x: jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    params = {"w": kernel}
    uses = jc.uses(conv, params, x)
    stats = jc.calibrate(conv, params, [x])
    c = jc.lsq("int8", activations=jc.activations("uint4", "learned", offset=True))
    small = jc.compress(params, c, uses=uses, stats=stats)
    step, offset = small["w"].scale.item(), small["w"].offset.item()
    rounded = np.clip(np.round((np.asarray(x) - offset) / step), 0, 15) * step + offset
    want = conv(jc.materialize(small), jnp.asarray(rounded, jnp.float32))
    run = jc.lift(conv)
    np.testing.assert_allclose(jax.jit(run)(small, x), want, rtol=1e-4, atol=1e-4)
    text = str(jax.make_jaxpr(run)(small, x))
    assert text.count("preferred_element_type=int32") == 2
    state = c.init(params, uses=uses, stats=stats)
    view = jax.jit(views(c, state))(params, state.learned)
    np.testing.assert_allclose(jax.jit(run)(view, x), want, rtol=1e-4, atol=1e-4)


def test_scanned_stacks():
    """Each layer has a step and an offset of its own."""
    w = steady(1, 3, 8, 8) * jnp.array([1.0, 3, 0.1])[:, None, None]

    def deep(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    params, x = {"w": w}, steady(2, 16, 8)
    uses, stats = jc.uses(deep, params, x), jc.calibrate(deep, params, [x])
    c = jc.lsq("int8", activations=jc.activations("uint7", "learned", offset=True))
    state = c.init(params, uses=uses, stats=stats)
    own = state.learned["w"]["input"]
    assert own["scale"].shape == own["offset"].shape == (3, 1, 1)
    assert len(np.unique(own["offset"])) == 3
    small, want = c.compress(params, state), deep(params, x)
    run = jax.jit(jc.lift(deep))
    assert jnp.abs(run(small, x) - want).max() < 0.1
    grads = jax.jit(jax.grad(lambda s: jc.lift(deep)(views(c, state)(params, s), x).sum()))
    slopes = grads(state.learned)["w"]["input"]
    assert np.asarray(slopes["scale"]).all()
    np.testing.assert_allclose(
        run(views(c, state)(params, state.learned), x), run(small, x), atol=1e-4
    )


@pytest.mark.parametrize("first", ["teacher", "student"])
def test_teacher_and_student_in_one_program(first):
    """A float model and its quantized form do not see each other, whichever is traced first."""
    params, x = mlp_params(3), jnp.abs(steady(9, 16, 8))
    model = lambda params, x: mlp(params, x)  # Not traced before.
    small = jc.compress(params, METHODS["lsq"], stats=jc.calibrate(mlp, params, [x]))
    run = jc.lift(model)

    @jax.jit
    def both(params, small, x):
        if first == "teacher":
            teacher = run(params, x)
            return teacher, run(small, x)
        student = run(small, x)
        return run(params, x), student

    teacher, student = both(params, small, x)
    np.testing.assert_allclose(teacher, mlp(params, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(student, jax.jit(jc.lift(mlp))(small, x), rtol=1e-5, atol=1e-5)
    assert jnp.abs(teacher - student).max() > 1e-3


@pytest.mark.parametrize(("bad", "got"), [(math.nan, 1.0), (-1.0, 2.0**-10), (math.inf, 2.0**10)])
def test_learned_values_stay_usable(bad, got):
    params = {"w": steady(0, 8, 4)}
    stats = jc.calibrate(dot, params, [steady(1, 9, 8)])
    for c in (
        jc.lsq("int4", activations=jc.activations("uint4", "learned", offset=True)),
        jc.lsq("int4", activations=jc.activations("uint4", "clipped")),
    ):
        state = c.init(params, stats=stats)
        spoiled = state._replace(learned=jax.tree.map(lambda x: x * 0 + bad, state.learned))
        now, start = (s.learned["w"] for s in (c.update(spoiled, params), state))
        offset = now["input"].pop("offset", jnp.zeros(()))
        assert np.isfinite(offset).all()
        start["input"].pop("offset", None)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b * got), now, start)


def test_files_hold_offsets(tmp_path):
    params = {"w": steady(0, 8, 4)}
    stats = jc.calibrate(dot, params, [steady(1, 9, 8)])
    small = jc.compress(
        params,
        jc.lsq("int4", activations=jc.activations("uint4", "learned", offset=True)),
        stats=stats,
    )
    jc.save(tmp_path / "c", small)
    assert_same_bits(jc.load(tmp_path / "c"), small)
    row = jc.report(params, small)["leaves"][0]
    assert row["method"] == "int4 x uint4 with fixed scale and offset"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda stats: jc.lsq("int4", activations=jc.activations("uint4", "learned")).init(
                EYE, stats=stats
            ),
            "go down to",
        ),
        (
            lambda stats: jc.quantize("int4", activations=jc.activations("uint4", "clipped")).init(
                EYE
            ),
            "statistics",
        ),
        (
            lambda stats: jc.quantize(
                "int4", begin=3, activations=jc.activations("uint4", "clipped", high=1.0)
            ).init(EYE),
            "begin=3 goes without",
        ),
        (
            lambda stats: jc.quantize(
                "int4", activations=jc.activations("uint4", "clipped", high=-1.0)
            ),
            "high=-1",
        ),
        (lambda stats: jc.dorefa("odd4", activations="int4"), "unsigned"),
        (lambda stats: jc.dorefa("int4"), "odd4"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(jc.calibrate(dot, EYE, [X]))
