"""The forms by which products read large weights on CPU, made to take small ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_compress.kernels import cpu_dots
from jaxopt_compress.kernels.dots import dequantized, scaled_after
from jaxopt_compress.numerics.packing import pack
from tests.kernels.products import planar_dot, scaled_dot

pytestmark = pytest.mark.ci

K, GROUP = 64, 16
ROUNDOFF = 2.0**-24
KINDS = ["int8", "int4", "uint4", "int2", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]
KINDS += ["bfloat16", "planar1", "planar2", "planar4"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows or 64 columns, of which small weights have several."""
    monkeypatch.setattr(cpu_dots, "_BLOCK", 0)
    monkeypatch.setattr(cpu_dots, "_DEPTH", 16)
    monkeypatch.setattr(cpu_dots, "_COLUMN_BLOCK", 0)


def weight(rng, kind, shape, block):
    """Stored codes and the same in float64; words are planar within `block` entries of K."""
    if kind.startswith("planar"):
        bits = int(kind.removeprefix("planar"))
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
        return pack(jnp.asarray(codes, jnp.int8), bits, -2, block), codes.astype(float)
    dtype = jnp.dtype(kind)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        codes = rng.integers(info.min, info.max, shape, endpoint=True)
        return jnp.asarray(codes, jnp.int32).astype(dtype), codes.astype(float)
    # All finite patterns of eight bits, with those below the smallest normal number among them.
    patterns = np.arange(256, dtype=np.uint8)
    patterns = patterns.view(dtype) if dtype.itemsize == 1 else patterns.astype(dtype)
    codes = rng.choice(patterns[np.isfinite(patterns.astype(np.float32))], shape)
    return jnp.asarray(codes), codes.astype(float)


def case(kind, rows, group=None, batch=(), dtype="float32", columns=24):
    """A form for CPU, its arguments, the product in float64 and a bound on the error.

    A float32 sum of K products, in any order, errs by at most K unit roundoffs relative to the sum
    of magnitudes; scaling and a second sum add some more.
    """
    rng = np.random.default_rng(0)
    stored, codes = weight(rng, kind, (*batch, K, columns), group or K)
    x = jnp.asarray(rng.normal(size=(*batch, rows, K)), dtype)
    groups = 1 if group is None else K // group
    scale = jnp.asarray(rng.uniform(0.5, 2.0, (*batch, groups, columns)), jnp.float32)
    bits = int(kind[-1]) if kind.startswith("planar") else None
    linear = scaled_after if groups == 1 else dequantized
    fn = functools.partial(cpu_dots.streamed_dot, bits=bits, linear=linear)
    dense = codes * np.repeat(np.asarray(scale, float), K // groups, axis=-2)
    wide = np.asarray(x, float)
    bound = (K + 6) * ROUNDOFF * (np.abs(wide) @ np.abs(dense))
    return fn, (x, stored, scale), wide @ dense, bound, dense


@pytest.mark.fast(
    "int8-None-1",
    "int8-None-70",
    "int4-None-3",
    "uint4-None-70",
    "float8_e4m3fn-None-3",
    "bfloat16-None-70",
    "planar2-None-1",
    "planar4-None-70",
    "int8-16-3",
    "int4-16-70",
    "planar2-16-1",
)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(
    "kind, group", [(k, None) for k in KINDS] + [(k, GROUP) for k in ("int8", "int4", "planar2")]
)
def test_forms(small_blocks, kind, rows, group):
    """One row, blocks of K, and blocks of columns with a rest."""
    fn, args, expected, bound, _ = case(kind, rows, group, columns=144)
    y = jax.jit(fn)(*args)
    assert y.dtype == jnp.float32
    assert np.all(np.abs(y - expected) <= bound)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_activations(small_blocks, dtype, rows):
    fn, (x, stored, scale), expected, bound, _ = case("int8", rows, GROUP, dtype=dtype)
    assert np.all(np.abs(fn(x, stored, scale) - expected) <= bound)
    assert fn(x, stored, scale.astype(dtype)).dtype == dtype


@pytest.mark.parametrize("kind, rows", [("int8", 1), ("int4", 3), ("planar2", 1), ("int8", 70)])
def test_batches(small_blocks, kind, rows):
    fn, args, expected, bound, _ = case(kind, rows, GROUP, batch=(2, 3))
    assert np.all(np.abs(jax.jit(fn)(*args) - expected) <= bound)


@pytest.mark.parametrize("depth, group", [(63, 21), (61, None), (62, 2), (60, 12)])
@pytest.mark.parametrize("rows", [1, 3])
def test_depths_that_blocks_do_not_divide(small_blocks, rows, depth, group):
    rng = np.random.default_rng(1)
    groups = 1 if group is None else depth // group
    x = rng.normal(size=(rows, depth)).astype(np.float32)
    codes = rng.integers(-128, 128, (depth, 7))
    scale = np.ones((groups, 7), np.float32)
    y = cpu_dots.streamed_dot(x, jnp.asarray(codes, jnp.int8), scale, linear=dequantized)
    bound = (depth + 6) * ROUNDOFF * (np.abs(x) @ np.abs(codes))
    assert np.all(np.abs(y - x.astype(float) @ codes) <= bound)


def test_float8_that_is_not_a_number(small_blocks):
    """It stays what it is, where XLA's own conversion is not used."""
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        codes = jnp.ones((K, 4), dtype).at[3, 1].set(jnp.nan)
        y = cpu_dots.streamed_dot(jnp.ones((1, K)), codes, jnp.ones((1, 4)), linear=scaled_after)
        assert list(np.isnan(y[0])) == [False, True, False, False]


@pytest.mark.ci
@pytest.mark.fast("int4-3", "planar4-1")
@pytest.mark.parametrize("kind, rows", [("int8", 1), ("int4", 3), ("planar4", 1), ("int8", 70)])
def test_transformations(small_blocks, kind, rows):
    fn, (x, stored, scale), expected, bound, dense = case(kind, rows, GROUP)
    if kind == "planar4":
        # The public function has the differentiable form of words.
        fn = functools.partial(planar_dot, bits=4, block=GROUP, group=GROUP)
    several = jnp.stack([x, -x, 2 * x])
    y = jax.jit(jax.vmap(fn, (0, None, None)))(several, stored, scale)
    assert np.all(np.abs(y - np.stack([expected, -expected, 2 * expected])) <= 2 * bound)
    y = jax.vmap(fn, (None, None, 0))(x, stored, jnp.stack([scale, 2 * scale]))
    assert np.all(np.abs(y - np.stack([expected, 2 * expected])) <= 2 * bound)
    y, tangent = jax.jvp(lambda x: fn(x, stored, scale), (x,), (2 * x,))
    assert np.all(np.abs(tangent - 2 * expected) <= 2 * bound + 2.0**-22 * np.abs(expected))
    by_x, by_scale = jax.grad(lambda x, s: fn(x, stored, s).sum(), (0, 1))(x, scale)
    slack = (dense.shape[1] + 6) * ROUNDOFF * np.abs(dense).sum(1)
    assert np.all(np.abs(by_x - dense.sum(1)) <= slack)
    wide, repeated = np.asarray(x, float), np.repeat(np.asarray(scale, float), GROUP, axis=0)
    of_groups = lambda a: a.reshape(K // GROUP, GROUP, -1).sum(1)
    terms = wide.sum(0)[:, None] * dense / repeated
    sizes = np.abs(wide).sum(0)[:, None] * np.abs(dense) / repeated
    slack = (rows + K) * ROUNDOFF * of_groups(sizes)
    assert np.all(np.abs(by_scale - of_groups(terms)) <= slack)


def test_rows_that_share_a_weight_are_one_product():
    """Mapped over, a single row must not take the form for one."""
    w, scale = jnp.ones((1024, 512), jnp.int8), jnp.ones((1, 512))
    fn = jax.vmap(lambda x: scaled_dot(x[None], w, scale)[0])
    sizes = [
        jax.jit(fn).lower(jnp.ones((rows, 1024))).compile().memory_analysis().temp_size_in_bytes
        for rows in (1, 100)
    ]
    # The sums of eight for each row would be 100 * 1024 / 8 * 512 floats.
    assert sizes[1] < 2 * 4 * 1024 * 512


@pytest.mark.parametrize("rows", [1, 8, 128])
@pytest.mark.parametrize("kind", ["int8", "int4", "int8 in groups", "int2"])
def test_no_dense_copy(kind, rows):
    """The temporaries of a product stay below a float32 copy of its weight."""
    depth = columns = 2048
    group = 128 if kind == "int8 in groups" else None
    scale = jax.ShapeDtypeStruct((depth // group if group else 1, columns), jnp.float32)
    x = jax.ShapeDtypeStruct((rows, depth), jnp.float32)
    if kind == "int2":
        fn = functools.partial(planar_dot, bits=2, block=depth)
        w = jax.ShapeDtypeStruct((depth // 4, columns), jnp.uint8)
    else:
        fn = functools.partial(scaled_dot, group=group)
        w = jax.ShapeDtypeStruct((depth, columns), "int4" if kind == "int4" else "int8")
    memory = jax.jit(fn).lower(x, w, scale).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.5 * 4 * depth * columns


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_inside_shard_map(small_blocks, rows):
    """The loops carry what differs between devices."""
    fn, args, expected, bound, _ = case("int8", rows, GROUP, columns=144)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P(None, "x"), P(None, "x"))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P(None, "x"))
    assert np.all(np.abs(jax.jit(mapped)(*args) - expected) <= bound)


@pytest.mark.fast("uint4-70", "uint8-3", "planar2-1")
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("kind", ["uint4", "uint8", "planar2"])
def test_codes_that_are_decoded(small_blocks, kind, rows):
    """An elementwise function says what codes stand for."""
    fn, (x, stored, scale), *_ = case(kind, rows, GROUP, columns=144)
    square = lambda codes: codes.astype(jnp.float32) ** 2 - 5
    linear = lambda x, codes, scale: dequantized(x, square(codes), scale)
    _, codes = weight(np.random.default_rng(0), kind, (K, 144), GROUP)
    dense = (codes**2 - 5) * np.repeat(np.asarray(scale, float), GROUP, axis=0)
    wide = np.asarray(x, float)
    bound = (K + 6) * ROUNDOFF * (np.abs(wide) @ np.abs(dense))
    y = jax.jit(functools.partial(fn, decode=square, linear=linear))(x, stored, scale)
    assert np.all(np.abs(y - wide @ dense) <= bound)
