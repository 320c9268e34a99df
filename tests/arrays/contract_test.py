"""The laws of every compressed array; those of its parts on devices are in `shards_test.py`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxopt_compress.tree import combine, nbytes, partition, resident_bytes
from tests.array_contract import LEAVES, ROUND_TRIPS, STACK, assert_same_bits
from tests.arrays.cases import assert_parts, each_leaf, made, materialize
from tests.arrays.example import float_fields


@pytest.mark.fast(
    "int8_inputs-stacked",
    "int4_grouped_asymmetric-stacked",
    "int2-single",
    "nf4-single",
    "nvfp4-stacked",
    "int5_ragged-single",
    "rows-stacked",
    "2:4_ragged-stacked",
    "low_rank_qkv-single",
    "quantized_factors-stacked",
)
@pytest.mark.parametrize("stack", [(), (STACK,)], ids=["single", "stacked"])
@each_leaf
def test_value_and_metadata(case, stack):
    leaf, formula, dense = made(case, stack)
    assert_parts(case, dense, formula(*float_fields(leaf)))
    assert (leaf.shape, leaf.dtype) == (dense.shape, dense.dtype)
    assert (leaf.ndim, leaf.size) == (dense.ndim, dense.size)
    assert jax.eval_shape(materialize, leaf) == jax.ShapeDtypeStruct(dense.shape, dense.dtype)
    times = STACK if stack else 1
    assert (leaf.nbytes, leaf.resident_bytes) == (times * case.nbytes, times * case.resident)
    assert (nbytes([leaf]), resident_bytes([leaf])) == (leaf.nbytes, leaf.resident_bytes)
    assert sum(map(nbytes, partition(leaf))) == leaf.nbytes


@pytest.mark.fast(
    "int8-stacked",
    "int4_grouped_asymmetric-single",
    "uint3-single",
    "nvfp4-single",
    "rows-single",
    "low_rank-single",
    "int8_2:4_asymmetric-stacked",
    "quantized_factors-single",
)
@pytest.mark.parametrize("stack", [(), (STACK,)], ids=["single", "stacked"])
@each_leaf
def test_same_bits_in_every_program(case, stack):
    """Alone, and fused with what makes its fields and with what consumes its result."""
    leaf, _, dense = made(case, stack)

    @jax.jit
    def larger(leaf):
        # Identities that the compiler cannot drop before it has seen what to fuse them with.
        leaf = jax.tree.map(lambda x: x[::-1][::-1] if x.ndim else x, leaf)
        w = leaf.materialize()
        wide = w.astype(jnp.float32)
        total = wide * 3.1 + 1.7
        if w.ndim > 1:
            total = total + jnp.swapaxes(wide, -1, -2).sum() + (w[..., :1, :] @ w.mT).sum()
        return w, total, (w * w + w).astype(jnp.bfloat16)

    if not stack:
        assert_same_bits(jax.jit(materialize)(leaf), dense)
    assert_same_bits(larger(leaf)[0], dense)


@pytest.mark.fast(
    "int8",
    "int4_grouped_asymmetric",
    "int2",
    "nvfp4",
    "rows",
    "2:4_ragged",
    "low_rank_qkv",
    "quantized_factors",
)
@each_leaf
def test_stacks(case):
    leaf, _, dense = made(case, (STACK,))
    assert_parts(case, jax.jit(jax.vmap(materialize))(leaf), dense)
    layers = jax.jit(lambda leaf: jax.lax.scan(lambda c, x: (c, x.materialize()), 0, leaf)[1])
    assert_parts(case, layers(leaf), dense)
    # Slices by NumPy, which compiles nothing.
    host = jax.device_get(leaf)
    layer = jax.tree.map(lambda x: jnp.asarray(x[2]), host)
    assert_parts(case, layer.materialize(), dense[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert_parts(case, jax.pmap(materialize)(host), dense)


@pytest.mark.parametrize("stack", [(), (STACK,)], ids=["single", "stacked"])
@each_leaf
def test_other_axes_than_the_leading_one_are_right_or_refused(case, stack):
    leaf, _, dense = made(case, stack)
    try:
        columns = jax.vmap(materialize, in_axes=-1)(leaf)
    except ValueError as error:
        # The others are JAX's own: fields of other sizes, such as a scale of size 1, or no axis.
        own = ("inconsistent sizes", "rank should be at least 1")
        assert any(s in str(error) for s in ("only leading axes", *own))
    else:
        assert_parts(case, columns, np.moveaxis(dense, -1, 0))


def test_other_axes_are_named_where_fields_are_of_equal_length():
    cases = {case.name: case for case in LEAVES}
    for name in ("int8", "int4_grouped_asymmetric", "int2", "2:4"):
        with pytest.raises(ValueError, match="only leading axes can be mapped over or scanned"):
            jax.vmap(materialize, in_axes=-1)(made(cases[name])[0])


@pytest.mark.fast(
    "int8",
    "int4_grouped_asymmetric",
    "nvfp4",
    "rows",
    "2:4_ragged",
    "low_rank",
    "quantized_factors",
)
@each_leaf
def test_gradients(case):
    """With respect to the float fields, as of the formula, through remat and a scan."""
    stacked, formula, dense = made(case, (STACK,))
    floats, rest = partition(stacked)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(floats))
    assert jax.tree.structure(combine(floats, rest)) == jax.tree.structure(stacked)
    if not jax.tree.leaves(floats):
        assert not float_fields(stacked)  # Steps that are powers of two are not trained.
        return
    weight = jnp.cos(3.0 * jnp.arange(dense.size)).reshape(dense.shape)

    def loss(floats):
        body = jax.checkpoint(lambda f, r: combine(f, r).materialize())

        def step(total, x):
            return total + jnp.sum(body(*x[:2]).astype(jnp.float32) * x[2]), None

        return jax.lax.scan(step, 0.0, (floats, rest, weight))[0]

    def plain(*floats):
        return jnp.sum(formula(*floats).astype(jnp.float32) * weight)

    got = jax.tree.leaves(jax.jit(jax.grad(loss))(floats))
    fields = float_fields(stacked)
    want = jax.jit(jax.grad(plain, argnums=tuple(range(len(fields)))))(*fields)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # Cotangents are rounded to the leaf's dtype in both; sums differ in their order.
        eps = max(float(jnp.finfo(x.dtype).eps) for x in fields)
        bound = 4 * eps * np.abs(b).max(initial=1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@each_leaf
def test_structure(case):
    leaf, _, dense = made(case)
    treedef = jax.tree.structure(leaf)
    other = jax.tree.structure(made(case, seed=1)[0])
    assert treedef == other and hash(treedef) == hash(other)
    same = jax.tree.map(lambda x: x, leaf)
    assert type(same) is type(leaf) and jax.tree.structure(same) == treedef
    assert_same_bits(same.materialize(), dense)
    for odd in (None, PartitionSpec("x"), object()):
        filled = jax.tree.unflatten(treedef, [odd] * treedef.num_leaves)
        back = jax.tree.leaves(filled, is_leaf=lambda x: x is None)
        assert all(x is odd for x in back if x is not None)
        assert repr(filled)


@each_leaf
def test_compiles_once(case):
    compiled, sizes = jax.jit(materialize), []
    for seed in (0, 1):
        leaf, _, dense = made(case, seed=seed)
        assert_same_bits(compiled(leaf), dense)
        sizes.append(compiled._cache_size())
    assert sizes[0] == sizes[1]


@each_leaf
def test_donation(case):
    leaf = case.example(seed=2).leaf
    want = np.asarray(leaf.materialize())
    kept = jax.jit(lambda leaf: jax.tree.map(lambda x: x, leaf), donate_argnums=0)(leaf)
    assert all(x.is_deleted() for x in jax.tree.leaves(leaf) if x.size)
    assert_same_bits(kept.materialize(), want)


@pytest.mark.parametrize("there_and_back", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@each_leaf
def test_round_trips(case, there_and_back):
    leaf, _, _ = made(case)
    back = there_and_back(leaf)
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(leaf), strict=True):
        assert_same_bits(a, b)


@each_leaf
def test_is_no_array(case):
    leaf, _, _ = made(case)
    message = "is not an array: pass it as an argument of a lifted function .* or materialize it"
    for use in (
        np.asarray,
        jnp.asarray,
        jnp.sum,
        lambda x: jnp.add(x, 1.0),
        lambda x: jnp.ones(3) + x,
        lambda x: np.ones(3) @ x,
        lambda x: x + 1.0,
        lambda x: 2 * x,
        lambda x: x[0],
    ):
        with pytest.raises(TypeError, match=message):
            use(leaf)
    with pytest.raises(AttributeError, match=message):
        leaf.T  # noqa: B018


def test_names_are_unique():
    assert len({case.name for case in LEAVES}) == len(LEAVES)
