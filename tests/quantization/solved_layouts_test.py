"""Methods that need data on convolutions, and on experts in every order of axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions_take_the_scales_of_their_input_channels(groups):
    """Channels of very different sizes: products of codes, and smaller errors than without."""

    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        return jnp.tanh(y / 30) @ params["v"]

    rng = np.random.default_rng(0)
    sizes = np.array([30, 1, 1, 1, 0.3, 3], np.float32)
    x = jnp.asarray(rng.standard_normal((8, 6, 6, 6)) * sizes, jnp.float32)
    params = {
        "w": jnp.asarray(rng.standard_normal((3, 3, 6 // groups, 12)), jnp.float32),
        "v": jnp.asarray(rng.standard_normal((12, 4)), jnp.float32),
    }
    given = {"uses": jc.uses(fn, params, x), "stats": jc.calibrate(fn, params, [x])}
    pairs = {
        "awq": (jc.awq("int4", where="w"), jc.quantize("int4", where="w")),
        "smooth_quant": (
            jc.smooth_quant(where="w"),
            jc.quantize("int8", where="w", activations="int8"),
        ),
    }
    for name, (method, plain) in pairs.items():
        small = jc.compress(params, method, **given)
        assert small["w"].factors.shape == (1, 1, 6 // groups, groups), name
        run = jax.jit(jc.lift(fn, on_fallback="error"))
        error = lambda small: float(jnp.abs(run(small, x) - fn(params, x)).mean())  # noqa: B023
        nearest = jc.compress(params, plain, **given)
        # With one input channel per output there are no channels that share a step of the weight.
        assert error(small) < (1.05 if groups == 6 else 1.0) * error(nearest), name


@pytest.mark.fast("fde")
@pytest.mark.parametrize("layout", ["edf", "def", "dfe", "efd", "fed", "fde"])
def test_experts_have_moments_of_their_own_wherever_their_axis_lies(layout):
    """The numbers are the same in each layout, and so are the errors of the products."""
    rng = np.random.default_rng(3)
    experts, rows, k, n = 3, 128, 8, 5
    loud = np.where(np.arange(k) % 3 == np.arange(experts)[:, None], 30.0, 0.3)
    mix = rng.normal(size=(experts, k, k))
    x = np.einsum("bed,edc->bec", rng.normal(size=(rows, experts, k)), mix) * loud
    w = rng.normal(size=(experts, k, n))
    fn = lambda p, x: jnp.einsum(f"bed,{layout}->bef", x, p["w"])

    def errors(layout, w, fn):
        params, seen = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
        uses, stats = jc.uses(fn, params, seen), jc.calibrate(fn, params, [seen])
        assert stats["w"][0].stack == (layout.index("e") - 3,)
        for c in (jc.gptq("int4"), jc.awq("int4"), jc.sparse_gpt(0.5)):
            small = jc.compress(params, c, uses=uses, stats=stats)
            yield float(jnp.linalg.norm(fn(jc.materialize(small), seen) - fn(params, seen)))

    usual = list(errors("edf", w, lambda p, x: jnp.einsum("bed,edf->bef", x, p["w"])))
    turned = w.transpose(["edf".index(a) for a in layout])
    np.testing.assert_allclose(list(errors(layout, turned, fn)), usual, rtol=1e-3)
