"""Lifted models of the zoo compute what they compute with materialized parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.lift.compressed import (
    BY_NAME,
    KINDS,
    assert_close,
    made,
    materialize,
    rescaled,
    small_params,
)
from tests.models import CASES

# One case for each way in which a leaf can be met; every kind of leaf goes through all of them.
REPRESENTATIVE = [
    "einsum_heads_in",
    "einsum_experts",
    "take",
    "take_columns",
    "transpose",
    "reshape_heads_out",
    "split",
    "concatenate_inputs",
    "scaled_by_constant",
    "conv_one_dimensional",
    "conv_grouped",
    "scan_stack",
    "fori_loop_index",
]
PAIRS = [(case.name, "int8") for case in CASES]
PAIRS += [(name, kind) for kind in KINDS if kind != "int8" for name in REPRESENTATIVE]
PAIRS += [
    (name, "low_rank") for name in ("take_of_rank_3", "conv_batch_grouped", "einsum_heads_between")
]
# No axis of this one holds a whole group.
PAIRS = [p for p in PAIRS if p not in {("conv_grouped", k) for k in ("int4_groups", "int2_planar")}]
# By default every fifth kind of weight of each representative, in turn.
IN_TURN = {
    (name, kind)
    for i, name in enumerate(REPRESENTATIVE)
    for j, kind in enumerate(KINDS)
    if kind != "int8" and (i + j) % 5
}
PAIRS = [pytest.param(*p, marks=pytest.mark.slow if p in IN_TURN else []) for p in PAIRS]


@functools.cache
def _dense_jitted(name):
    return jax.jit(made(name)[0])


def _policy(name):
    return "densify" if BY_NAME[name].expanded else "error"


# int8 in a function of each kind, and each form where most becomes of it.
FAST = """
linen_attention-int8 linen_tied_embedding-int8 linen_gru-int8 linen_batch_norm-int8
linen_scanned_transformer-int8 nnx_attention-int8 equinox_conv_attention-int8 haiku_lstm-int8
matvec-int8 einsum_heads_out-int8 einsum_experts-int8 einsum_two_weights-int8 take-int8
gather-int8 transpose-int8 reshape_heads_in-int8 split-int8 concatenate_inputs-int8
scaled_by_parameter-int8 cast-int8 conv_grouped-int8 conv_transpose-int8
conv_channels_first_batch_last-int8 ragged_dot-int8 scan_nested-int8 scan_carry-int8
while_loop-int8 fori_loop_index-int8 switch-int8 static_index-int8 dynamic_index-int8
vmap_models-int8 custom_vjp_of_weight-int8 custom_jvp_of_activation-int8 checkpoint_policy-int8
checkpoint_name_of_weight-int8 shard_map_tensor_parallel-int8 einsum_heads_in-int4_groups
scan_stack-int4_groups take_columns-int4_asymmetric conv_grouped-int4_asymmetric split-int2_planar
concatenate_inputs-int2_planar einsum_experts-sparse take-sparse scan_stack-two_of_four
conv_one_dimensional-two_of_four reshape_heads_out-low_rank concatenate_inputs-low_rank
transpose-pruned_int8 fori_loop_index-pruned_int8 einsum_experts-low_rank_int8
scan_stack-low_rank_int8
"""


@pytest.mark.fast(*FAST.split())
@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=lambda x: x)
def test_equals_materialized_and_traces_once(name, kind):
    fn, _, args, _ = made(name)
    small = small_params(name, kind)
    traces = []

    @jax.jit
    def lifted(params, *args):
        traces.append(name)
        return jc.lift(fn, on_fallback=_policy(name))(params, *args)

    # The dense product takes weights rounded to bfloat16, the lifted one exact codes.
    tolerance = 2**-7 if name == "cast" else 2e-5
    for params in (small, rescaled(small)):
        expected = _dense_jitted(name)(materialize(params), *args)
        assert_close(lifted(params, *args), expected, tolerance)
    assert len(traces) == 1


def _projection(out):
    """A number that every entry of the outputs reaches with its own weight."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(out)]
    return sum(jnp.vdot(jnp.cos(7.0 * jnp.arange(x.size)).reshape(x.shape), x) for x in leaves)


GRADIENTS = [
    ("linen_scanned_transformer", "int8"),
    ("linen_mlp", "int4_groups"),
    ("custom_vjp_of_weight", "int8"),
    ("custom_jvp_of_weight", "low_rank"),
    ("custom_jvp_of_activation", "int4_asymmetric"),
    ("checkpoint_policy", "low_rank_int8"),
    ("scan_constant", "int8"),
    ("cond", "sparse"),
    ("concatenate_inputs", "low_rank"),
    ("shard_map_data_parallel", "int8"),
    ("shard_map_tensor_parallel", "two_of_four"),
    ("conv_strided", "low_rank"),
]


@pytest.mark.fast(
    "linen_scanned_transformer-int8",
    "custom_vjp_of_weight-int8",
    "checkpoint_policy-low_rank_int8",
    "cond-sparse",
    "shard_map_tensor_parallel-two_of_four",
)
@pytest.mark.parametrize(("name", "kind"), GRADIENTS, ids=lambda x: x)
def test_gradients_equal_those_through_materialize(name, kind):
    fn, _, args, _ = made(name)
    floats, rest = jc.partition((small_params(name, kind), args))

    def lifted(floats):
        params, args = jc.combine(floats, rest)
        return _projection(jc.lift(fn, on_fallback=_policy(name))(params, *args))

    def dense(floats):
        params, args = jc.combine(floats, rest)
        return _projection(fn(jc.materialize(params), *args))

    got, expected = jax.jit(lambda f: (jax.grad(lifted)(f), jax.grad(dense)(f)))(floats)
    # Sums over the entries of a channel come on top of those over rows.
    assert_close(got, expected, 1e-4)
    assert any(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(got))


def test_forward_mode():
    fn, _, args, _ = made("while_loop")
    floats, rest = jc.partition(small_params("while_loop", "int8"))
    run = lambda f, view: view(jc.combine(f, rest), *args)
    along = lambda view: jax.jvp(lambda f: run(f, view), (floats,), (floats,))
    dense = lambda params, *args: fn(jc.materialize(params), *args)
    assert_close(*jax.jit(lambda: (along(jc.lift(fn, "error")), along(dense)))())


def test_hessian_product():
    small = jc.compress({"w": jnp.linspace(-1, 1, 96).reshape(16, 6)}, jc.quantize("int8"))
    model = lambda params, x: jnp.tanh(x @ params["w"]).sum()
    x = jnp.linspace(-1, 1, 16) / 4  # not so large that 1 - tanh**2 cancels
    product = jax.jit(lambda f: jax.jvp(jax.grad(f), (x,), (x,))[1], static_argnums=0)
    got = product(lambda x: jc.lift(model, "error")(small, x))
    assert_close(got, product(lambda x: model(jc.materialize(small), x)))


@jax.jit
def _mapped(params, xs):
    return jax.vmap(made("scan_stack")[0], in_axes=(None, 0))(params, xs)


@pytest.mark.parametrize("kind", ["int8", "int4_groups", "low_rank", "sparse"])
def test_vmap_over_examples_and_over_models(kind):
    fn, _, (x,), _ = made("scan_stack")
    small = small_params("scan_stack", kind)
    lifted = jc.lift(fn, "error")
    xs = np.stack([x, 2 * np.asarray(x)])
    models = jax.tree.map(lambda a: jnp.asarray(np.stack([a, a])), small)
    expected = _mapped(materialize(small), xs)
    assert_close(jax.jit(jax.vmap(lifted, in_axes=(None, 0)))(small, xs), expected)
    assert_close(jax.jit(jax.vmap(lifted))(models, xs), expected)


def _block(w, h):
    return h + jnp.tanh(h @ w["up"]) @ w["down"]


@functools.partial(jax.jit, static_argnums=0)
def _scanned(block, params):
    h = made("scan_stack")[2][0]
    return jax.lax.scan(lambda h, w: (block(w, h), None), h, params)[0]


@pytest.mark.parametrize("kind", ["int8", "int2_planar", "two_of_four", "low_rank_int8"])
def test_lift_inside_scan(kind):
    small = small_params("scan_stack", kind)
    lifted = jc.lift(_block, "error")
    assert_close(_scanned(lifted, small), _scanned(_block, materialize(small)))


@pytest.mark.parametrize("kind", ["int8", "low_rank"])
def test_scan_over_an_axis_that_was_assumed_to_be_summed_over(kind):
    """Without uses rank 4 is taken for a convolution: fields are constant along the real stack."""
    w = {"w": jnp.sin(jnp.arange(2.0 * 3 * 8 * 8)).reshape(2, 3, 8, 8)}
    with pytest.warns(jc.AssumedLayout):
        small = jc.compress(w, KINDS[kind])

    def model(params, x):
        inner = lambda h, stack: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, stack)
        return jax.lax.scan(inner, x, params["w"])[0]

    x = jnp.ones((4, 8))
    expected = jax.jit(model)(materialize(small), x)
    assert_close(jax.jit(jc.lift(model, "error"))(small, x), expected)
