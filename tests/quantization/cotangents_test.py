"""Quantized backward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from tests.quantization.learned import knowing, mlp, mlp_params, steady, train
from tests.quantization.products import PRODUCTS, derivatives, distance, matmul, view_of

FORMATS = ("int8", "int4", "float8_e5m2")


@pytest.mark.parametrize("name", PRODUCTS)
def test_close_to_the_backward_pass_in_floats(name):
    """The rounding's noise is that of the format, relative to the largest entry of a row."""
    fn, w_shape, x_shape, options = PRODUCTS[name]
    params, x = {"w": steady(0, *w_shape) / w_shape[-2] ** 0.5}, steady(1, *x_shape)
    uses, g = jc.uses(fn, params, x), steady(2, *jax.eval_shape(fn, params, x).shape)
    views = [
        view_of(
            jc.quantize(**{"format": "int8", **options}, activations="int8", backward=fmt),
            params,
            uses=uses,
        )
        for fmt in (None, *FORMATS)
    ]
    want, *rest = jax.jit(lambda views: [derivatives(fn, view, x, g) for view in views])(views)
    int8, int4, e5m2 = (distance(got, want) for got in rest)
    # Of n normal entries the largest is about 2 to 3; a level of int8 is 1/127 of it, and the error
    # of stochastic rounding 0.4 of a level. Three layers add up theirs.
    layers = 3 if name == "stack" else 1
    assert 0.003 < int8 < 0.015 * layers
    assert 10 < int4 / int8 < 30
    # Two bits of mantissa: neighbours are 1/4 to 1/8 apart.
    assert 0.02 < e5m2 < 0.08 * layers


def test_integers_meet_integers():
    view = view_of(
        jc.quantize("int8", activations="int8", backward="int8"), {"w": steady(0, 32, 16)}
    )
    x, g = steady(1, 24, 32), steady(2, 24, 16)
    staged = jax.jit(lambda view, x, g: derivatives(matmul, view, x, g)).trace(view, x, g)
    text = staged.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all(line.count("xi8>") == 2 and "xi32>" in line for line in products), products


def test_gradients_keep_their_expected_value():
    """Errors of 256 cotangents, equal but for their last bits, cancel as random ones do."""
    params, x = {"w": steady(0, 32, 16)}, steady(1, 24, 32)
    g = steady(2, 24, 16) * (1 + 1e-5 * steady(3, 256, 24, 16))
    pull = lambda fmt: jax.jit(
        jax.vmap(
            functools.partial(
                derivatives,
                matmul,
                view_of(jc.quantize("int8", activations="int8", backward=fmt), params),
                x,
            )
        )
    )(g)
    got, want = pull("int4"), pull(None)
    mean = functools.partial(jax.tree.map, lambda a: a.mean(0))
    one = distance(got, want)
    assert distance(mean(got), mean(want)) < 1.5 * one / 256**0.5


@pytest.mark.parametrize("rows", [3 * 2**17, 131101])
def test_sums_of_many_products(rows):
    """More rows than an int32 can sum are summed by parts, be their number prime."""
    x = jnp.full((rows, 1), 127.0)
    view = view_of(
        jc.quantize("int8", activations="int8", backward="int8"), {"w": jnp.ones((1, 2))}
    )
    held, _ = jax.jit(lambda g: derivatives(matmul, view, x, g))(jnp.full((rows, 2), 2.0))
    to_w = held["w"].weight.form.codes
    # The activation is at the top of its range, half a step below which its last level lies.
    np.testing.assert_allclose(to_w, rows * 127 * 2, rtol=0.01)


def test_memory_of_many_products():
    """A prime number of rows takes the memory of one next to it with divisors, and of copies."""
    view = view_of(
        jc.quantize("int8", activations="int8", backward="int8"), {"w": jnp.ones((16, 16))}
    )

    def temporaries(rows):
        x = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
        staged = jax.jit(lambda view, x, g: derivatives(matmul, view, x, g)).trace(view, x, x)
        return staged.lower().compile().memory_analysis().temp_size_in_bytes

    prime, few = temporaries(131101), temporaries(2**17 - 2)
    # Two operands of int8, each padded for parts of one size.
    assert prime < few + 2 * 131101 * 16, (prime, few)


def test_across_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x, g = {"w": steady(0, 32, 16)}, steady(1, 64, 32), steady(2, 64, 16)
    view = view_of(jc.quantize("int8", activations="int8", backward="int8"), params)
    want = jax.jit(lambda x, g: derivatives(matmul, view, x, g))(x, g)
    own = lambda x, g: derivatives(matmul, view, x, g)[1]
    split = jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    # Rows are rounded by themselves, and entries by their position in a shard.
    assert distance(jax.jit(split)(x, g), want[1]) < 0.02
    parts = lambda a: a.reshape(8, 8, -1)
    assert distance(jax.pmap(own)(parts(x), parts(g)).reshape(64, 32), want[1]) < 0.02
    place = lambda a: jax.device_put(a, jax.NamedSharding(mesh, P("data")))
    got = jax.jit(lambda x, g: derivatives(matmul, view, x, g))(place(x), place(g))
    assert distance(got, want) < 1e-6


METHODS = {
    "quantize": jc.quantize("int8", activations="int8", backward="int8"),
    "lsq": jc.lsq(
        "int4", activations=jc.activations("uint4", "learned", offset=True), backward="int8"
    ),
    "pact": jc.quantize("int4", activations=jc.activations("uint4", "clipped"), backward="int8"),
    "dorefa": jc.dorefa("odd4", activations="uint4", backward="int4"),
}


@pytest.mark.ci
@pytest.mark.parametrize("name", METHODS)
def test_training(name):
    params, x = mlp_params(), jnp.abs(steady(9, 64, 8))
    x = x / x.max() if name == "dorefa" else x
    c = knowing(METHODS[name], jc.calibrate(mlp, params, [x]))
    tx = jc.compressed_training(optax.adam(1e-2), c, learned=optax.adam(3e-3))
    params, state, losses = train(c, tx, tx.init(params), params, x, mlp(mlp_params(7), x))
    assert losses[-1] < 0.6 * losses[0], losses[::13]
    stored = jax.tree.leaves(
        jc.compress(params, c, state=state), is_leaf=lambda x: hasattr(x, "gradients")
    )
    assert [leaf.gradients for leaf in stored] == [None, None]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: jc.quantize("int8", backward="int8"), "'int8' goes with activations="),
        (lambda: jc.lsq("int8", backward="int8"), "'int8' goes with activations="),
        (
            lambda: jc.quantize(
                "int8", activations="int8", backward=jc.backward("int8", residuals="unrounded")
            ),
            "goes with a backward pass in floats, not with",
        ),
        (
            lambda: jc.quantize("int8", begin=3, backward=jc.backward(residuals="unrounded")),
            "begin=3 goes without",
        ),
        (
            lambda: jc.quantize("int8", activations="int8", backward=jc.backward(residuals="raw")),
            "'rounded', 'recomputed', 'unrounded'",
        ),
        (lambda: jc.quantize("int8", activations="int8", backward="uint8"), "either sign"),
        (lambda: jc.dorefa("odd4", activations="uint4", backward="mxfp4"), "one scale per row"),
        (
            lambda: jc.quantize(
                "int4", activations=jc.activations("uint4", "clipped"), backward="int7x"
            ),
            "unknown number format",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("inputs", ["int8", "float8_e4m3fn"])
def test_rows_that_make_their_own_range_are_not_clipped(inputs):
    """The largest entry of a row, which its step follows, gets its gradient as others do."""
    params, x, g = {"w": steady(0, 32, 16)}, steady(1, 24, 32), steady(2, 24, 16)
    view = view_of(jc.quantize("int8", activations=inputs), params)
    _, to_x = derivatives(matmul, view, x, g)
    np.testing.assert_allclose(to_x, g @ jc.materialize(view)["w"].T, rtol=1e-5, atol=1e-5)
