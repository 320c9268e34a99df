"""What formats take, counted by hand and in files, and the way through a checkpoint."""

import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import FORMATS
from tests.quantization import cases
from tests.quantization.cases import each_format

pytestmark = pytest.mark.xdist_group("quantization_storage")
STEP_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e8m0fnu": 1, "float8_e4m3fn": 1}


@each_format
def test_bytes(name):
    """Codes of their true width, a step for each group, and zero points of a byte or two."""
    fmt = FORMATS[name]
    for variant, given in cases.variants(name, cases.VARIANTS).items():
        rows, columns = shape = cases.RAGGED if variant == "pad" else cases.SHAPE
        group = given.get("group_size")
        along, across = group if isinstance(group, tuple) else (group, None)
        along = along or fmt.group or rows
        steps = math.ceil(rows / along) * (columns if across is None else columns // across)
        scale = given.get("scale_dtype", fmt.scale)
        # Steps of float8_e4m3fn share one of float32.
        want = steps * STEP_BYTES[scale] + (4 if scale == "float8_e4m3fn" else 0)
        if not given.get("symmetric", True):
            want += steps * (2 if fmt.bits == 16 else 1)
        want += math.ceil(rows * columns * fmt.bits / 8)
        got = cases.form_of(name, given, shape)
        assert got.nbytes == want, variant
        assert got.shape == shape


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.packed])
def test_bytes_in_memory(name):
    """Packed codes take their true width in memory too, where whole words fit an axis."""
    fmt = FORMATS[name]
    for shape, whole in [((64, 8), True), ((56, 24), True), ((7, 64), True), ((7, 9), False)]:
        given = {**cases.options(name), "group_size": None}
        if fmt.group is not None:
            given = {"group_size": 7 if shape[0] == 7 else 8}
        codes = cases.form_of(name, given, shape).codes
        # In groups, words lie along them.
        whole = whole and not (fmt.group is not None and shape[0] == 7)
        assert codes.dtype == (jnp.uint8 if whole else fmt.dtype)
        size = math.prod(shape)
        assert math.prod(codes.shape) == (size * fmt.bits // 8 if whole else size), shape


@pytest.mark.parametrize("shape", [(7, 9), (5, 3), (1, 1)])
@pytest.mark.parametrize("name", ["int3", "int1", "pot5", "int4", "float6_e2m3fn"])
def test_bytes_of_odd_sizes(name, shape):
    """Codes are filled up to a whole byte, once for all of them."""
    small = cases.form_of(name, cases.options(name), shape)
    codes = math.ceil(math.prod(shape) * FORMATS[name].bits / 8)
    steps = 4 * shape[1] + (shape[1] if name == "int1" else 0)
    assert small.nbytes == codes + steps


# Forms whose parts are of other kinds than those of a default.
FORMS = {name: (name, {}) for name in FORMATS} | {
    "int3_tile": ("int3", {"group_size": (16, 4)}),
    "int3_pad": ("int3", {"group_size": 24, "pad": True}),
    "uint5_asymmetric": (
        "uint5",
        {"group_size": 16, "symmetric": False, "scale_dtype": "bfloat16"},
    ),
    "int16_asymmetric": ("int16", {"symmetric": False}),
    "nf4_double": ("nf4", {"group_size": 16, "scale_dtype": "float8_e4m3fn"}),
    "int4_powers": ("int4", {"group_size": 16, "scale_dtype": "float8_e8m0fnu"}),
    "float6_float16": ("float6_e2m3fn", {"scale_dtype": "float16"}),
}


@functools.cache
def saved_and_loaded():
    """All forms, in one checkpoint."""
    small = {}
    for form, (name, given) in FORMS.items():
        options = {**cases.options(name), **given}
        small[form] = cases.at_random(cases.form_of(name, options, cases.SHAPE))
    # Codes under a mask, one of a format that has no zero.
    params = {"w": jnp.asarray(cases.ordinary(0, cases.SHAPE))}
    masked = jc.chain(
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.quantize("pot3")
    )
    small["sparse"] = jc.compress(params, masked)["w"]
    masked = jc.chain(
        jc.quantize("binary"), jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), "2:4")
    )
    small["sparse_binary"] = jc.compress(params, masked)["w"]
    with tempfile.TemporaryDirectory() as folder:
        jc.save(f"{folder}/small", small)
        return small, jc.load(f"{folder}/small")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("form", [*FORMS, "sparse", "sparse_binary"])
def test_through_a_checkpoint(form):
    small, loaded = (tree[form] for tree in saved_and_loaded())
    assert type(loaded) is jc.QuantizedArray
    # Static fields are part of the structure.
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    cases.assert_same_bits(loaded, small)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(small), strict=True):
        assert type(got) is type(want)


@pytest.mark.parametrize("form", [*FORMS, "sparse", "sparse_binary"])
def test_codes_are_no_floats_for_optimizers(form):
    """Steps of two bytes and more can be trained; codes, and steps of one byte, are left out."""
    small = saved_and_loaded()[0][form]
    floats, rest = jc.partition(small)
    assert all(x.dtype.itemsize > 1 for x in jax.tree.leaves(floats))
    assert not jax.tree.leaves(floats.codes)
    assert jax.tree.structure(jc.combine(floats, rest)) == jax.tree.structure(small)


@pytest.mark.parametrize("name", ["int3", "uint7", "binary"])
def test_files_are_as_small(name):
    """Values that cannot be told apart from noise take their bits on disk, and little beside."""
    given = {**cases.options(name), "symmetric": name != "uint7"}
    small = cases.at_random(cases.form_of(name, given, (1024, 256)))
    with tempfile.TemporaryDirectory() as folder:
        jc.save(f"{folder}/small", small)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    # A format description, and an index of the arrays.
    assert size <= jc.nbytes(small) * 1.02 + 16_000
