"""What is refused, before anything is computed."""

import jax
import jax.numpy as jnp
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import FORMATS
from tests.quantization.cases import assert_same_bits, normal

W = normal(6, 3)
MODEL = lambda p, x: x @ p["w"]
STATS = jc.calibrate(MODEL, {"w": W}, [W.T])


def init(params, *args, **kwargs):
    return lambda: jc.quantize(*args, **kwargs).init(params)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jc.quantize("int9"), ValueError, "unknown .* 'int9'; there are int16, int8, .*nv"),
        (lambda: jc.quantize("int4", group_size=0), ValueError, "group_size=0.*at least one"),
        (
            lambda: jc.quantize("int4", group_size=(8, 0)),
            ValueError,
            r"group_size=\(8, 0\).*at least one",
        ),
        (
            lambda: jc.quantize("int4", scale_dtype="int8"),
            ValueError,
            "scale_dtype='int8'; scales are held in float32, bfloat16, .*e8m0fnu, .*e4m3fn",
        ),
        (lambda: jc.quantize("int4", [4, 4]), TypeError, r"group_size=\[4, 4\]; .* or a pair"),
        (lambda: jc.quantize("int4", (8,)), TypeError, r"group_size=\(8,\); .* or a pair"),
        (
            lambda: jc.quantize("int4", (4, 4, 4)),
            TypeError,
            r"group_size=\(4, 4, 4\); .* or a pair",
        ),
        (lambda: jc.quantize("int4", 4.0), TypeError, "group_size=4.0; it is a number of entries"),
        (lambda: jc.quantize("int4", bounds="mse"), TypeError, r"bounds='mse'; .* such as mse\(\)"),
        (lambda: jc.quantize("int4", bounds=jc.bounds.mse), TypeError, r"such as mse\(\)"),
        (lambda: jc.quantize("int4", key=0), TypeError, "key=0; it is a random key"),
        (lambda: jc.quantize("int4", begin=-3), ValueError, "begin=-3, .*count from 0"),
        (lambda: jc.quantize("int4", freeze=-1), ValueError, "freeze=-1: updates count from 0"),
        (lambda: jc.quantize("int4", begin=9, freeze=3), ValueError, "frozen after .* has begun"),
        (
            lambda: jc.quantize("int4", activations=8),
            TypeError,
            "activations=8; it is the name of a number format",
        ),
        (
            lambda: jc.quantize("int4", backward=True),
            TypeError,
            "backward=True; it is the name of a number format",
        ),
        (lambda: jc.activations("int8", "fixed"), ValueError, "high=None with step='fixed'"),
        (lambda: jc.activations("int8", "clipped", high=-1), ValueError, "a positive number"),
        (lambda: jc.activations("int16", "learned"), ValueError, "integers of at most 8 bits"),
        (lambda: jc.progressive([jc.quantize("int4")]), TypeError, "takes {update: quantize"),
        (lambda: jc.progressive({0.5: jc.quantize("int4")}), TypeError, "takes {update: quantize"),
        (lambda: jc.quantize_array(jnp.arange(4), "int8"), TypeError, r"int32\[4\]: only floats"),
        (
            lambda: jc.quantize("int4").init({"w": W}, uses=STATS),
            TypeError,
            r"uses= takes what jaxopt_compress.uses\(",
        ),
        (
            lambda: jc.quantize("int4").init({"w": W}, stats=jc.uses(MODEL, {"w": W}, W.T)),
            TypeError,
            r"stats= takes what jaxopt_compress.calibrate\(",
        ),
        (
            lambda: jc.quantize("int8", activations=jc.activations("uint8", "calibrated")).init(
                {"w": W}, stats=STATS
            ),
            ValueError,
            r"activations that meet 'w' of shape \(6, 3\) go down to -.*take a signed format",
        ),
        (lambda: jc.quantize("nf4", symmetric=False), ValueError, "'nf4' has no zero point.*=True"),
        (lambda: jc.quantize("ternary", symmetric=False), ValueError, "'ternary' has no zero"),
        (
            lambda: jc.quantize("int4", symmetric=False, scale_dtype="float8_e8m0fnu"),
            ValueError,
            "scale_dtype='float8_e8m0fnu' goes with symmetric=True only",
        ),
        (lambda: jc.quantize("int1"), ValueError, "'int1' has no positive code.*symmetric=False"),
        (
            lambda: jc.quantize("binary", bounds=jc.bounds.mse()),
            ValueError,
            "scale of 'binary' is the mean magnitude; leave bounds out",
        ),
        (
            init({"a": {"w": W}}, "int4", group_size=4),
            ValueError,
            r"group_size=4 .*axis -2 of 'a/w' of shape \(6, 3\), of length 6; .* 2, 3, 6, or pass",
        ),
        (
            init({"a": {"w": W}}, "int4", group_size=(3, 2)),
            ValueError,
            r"group_size=2 .*axis -1 of 'a/w' of shape \(6, 3\), of length 3; .* 1, 3,",
        ),
        (
            init({"w": W}, "mxfp4"),
            ValueError,
            r"group_size=32 .* 'w' of shape \(6, 3\), of length 6",
        ),
        (
            init({"b": jnp.ones(4)}, "int4", group_size=2, where="b"),
            ValueError,
            r"'b' of shape \(4,\) has no .*axis for groups of 2: leave group_size out",
        ),
        (
            init({"w": W}, "uint4"),
            ValueError,
            r"'w' of shape \(6, 3\) has negative entries, which 'uint4' .* symmetric=False, or .*",
        ),
        (
            init({"w": W.at[2, 1].set(jnp.inf)}, "int4"),
            ValueError,
            r"'w' of shape \(6, 3\) holds 1 entries that are infinite, NaN or beyond",
        ),
        (
            init({"ids": jnp.arange(4)}, "int4", where="ids"),
            TypeError,
            r"'ids' of shape \(4,\) and dtype int32: only floating leaves.*exclude",
        ),
        (
            init({"bias": jnp.ones(3)}, "int4"),
            ValueError,
            "no floating leaf of rank 2 or more among bias",
        ),
        (
            init(jc.compress({"w": W}, jc.quantize("int8")), "int4"),
            TypeError,
            r"'w' of shape \(6, 3\) is already a QuantizedArray.*materialize it",
        ),
        (
            init({"w": W}, "nf4", bounds=jc.bounds.entropy()),
            ValueError,
            "symmetric range and signed integers",
        ),
        (
            init({"w": W}, "int8", bounds=jc.bounds.entropy(64)),
            ValueError,
            r"entropy\(64\) needs more bins than 'int8'",
        ),
    ],
)
def test_errors_name_path_shape_and_what_works(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_checks_come_before_work():
    """A parameter that cannot be quantized is named although an earlier one could be."""
    params = {"a": normal(8, 4), "b": {"w": W}}
    with pytest.raises(ValueError, match=r"'b/w' of shape \(6, 3\)"):
        jax.eval_shape(lambda p: jc.quantize("int4", group_size=8).init(p), params)


def test_known_parameters_inside_of_jit():
    """Weights that a traced function closes over are quantized there as outside of it."""
    params = {"w": W}
    for c in (jc.quantize("int4"), jc.quantize("uint4", symmetric=False)):
        want = c.apply(params, c.init(params))
        assert_same_bits(jax.jit(lambda c=c: c.apply(params, c.init(params)))(), want)
    c, params = jc.quantize("uint4"), {"w": jnp.abs(W)}
    assert_same_bits(
        jax.jit(lambda: c.apply(params, c.init(params)))(), c.apply(params, c.init(params))
    )


def test_a_format_of_ones_own():
    """Stored arrays know their format by name, so one without a known name is refused."""
    levels = FORMATS["int4"].grid._replace(low=-7)
    for own in (FORMATS["int4"]._replace(name="narrow"), FORMATS["int4"]._replace(grid=levels)):
        with pytest.raises(ValueError, match=f"'{own.name}'.*know theirs by name"):
            jc.quantize(own)


@pytest.mark.parametrize(
    "c",
    [
        jc.quantize("int8", begin=3),
        jc.progressive({0: jc.quantize("int8"), 3: jc.quantize("int4")}),
    ],
    ids=["begin", "progressive"],
)
def test_forms_that_depend_on_the_update_are_stored_outside_of_jit(c):
    state = c.init({"a": {"w": W}})
    with pytest.raises(TypeError, match=r"'a/w' is stored in a form .*: compress it outside"):
        jax.jit(c.compress)({"a": {"w": W}}, state)


def test_what_a_dense_weight_loses():
    """A weight that falls back meets activations as they are."""
    small = jc.compress({"w": W}, jc.quantize("int8", activations="int8"))
    with pytest.warns(jc.FallbackWarning, match="its dense form, whose activations are not round"):
        jc.lift(lambda p: jnp.sin(p["w"]))(small)
