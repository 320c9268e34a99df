"""What is easily confused is answered in one line that says what was meant."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc

PARAMS = {"w": jnp.linspace(-1, 1, 32).reshape(8, 4), "b": jnp.zeros(4)}
X = jnp.ones((2, 8))
INT8, HALF = jc.quantize("int8"), jc.schedules.constant(0.5)
SMALL = jc.compress(PARAMS, INT8)
LEAF = SMALL["w"]
NO_ARRAY = r"QuantizedArray of shape \(8, 4\) is not an array: .*lift\), or .*materialize"


def model(params, x):
    return x @ params["w"] + params["b"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jc.compress(INT8, PARAMS), "the parameters first; .* here is a Compression"),
        (lambda: jc.compress({"w": INT8}, PARAMS), "first; .* here is a dict of Compressions"),
        (
            lambda: jc.compress(PARAMS, jc.quantize),
            r"such as quantize\('int8'\).*function quantize",
        ),
        (lambda: jc.compress(PARAMS, "int8"), r"such as quantize\('int8'\).* this is 'int8'"),
        (lambda: jc.compress(PARAMS, PARAMS), r"this one maps 'w' to an array float32\[8,4\]"),
        (lambda: jc.compress(PARAMS, optax.sgd(0.1)), "this is a GradientTransformation"),
        (lambda: jc.report(SMALL, PARAMS), "the parameters first"),
        (lambda: jc.lift(model, SMALL), r"lift\(fn\)\(small, ...\); .*function model, a dict"),
        (lambda: jc.lift(SMALL), r"this is lift\(a dict, 'warn'\)"),
        (lambda: jc.prune(jc.scores.magnitude, HALF), r"jaxopt_compress.scores.magnitude\(\) is"),
        (
            lambda: jc.prune(jc.scores.magnitude(), jc.schedules.constant),
            r"jaxopt_compress.schedules.constant\(0.5\) is one",
        ),
        (lambda: jc.compressed_training(optax.sgd(0.1), INT8).init(SMALL), "'w' .* is already a"),
        (lambda: LEAF + 1, NO_ARRAY),
        (lambda: 2.0 * LEAF, NO_ARRAY),
        (lambda: -LEAF, NO_ARRAY),
        (lambda: LEAF > 0, NO_ARRAY),
        (lambda: LEAF[0], NO_ARRAY),
        (lambda: LEAF @ X.T, NO_ARRAY),
        (lambda: X @ LEAF, NO_ARRAY),
        (lambda: np.ones((2, 8)) @ LEAF, NO_ARRAY),
        (lambda: np.add(1, LEAF), "QuantizedArray"),
        (lambda: model(SMALL, X), NO_ARRAY),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_attributes_of_arrays_are_not_those_of_compressed_ones():
    for name in ("T", "sum", "reshape", "at"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}': a {NO_ARRAY}"):
            getattr(LEAF, name)
    with pytest.raises(AttributeError, match=r"'QuantizedArray' object has no attribute 'cods'$"):
        LEAF.cods  # noqa: B018
    assert not hasattr(LEAF, "T") and not hasattr(LEAF.replace(codes=None), "shape")
