"""Every format with every way to share and hold steps, and values that are hard to hold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import FORMATS
from jaxopt_compress.numerics.integers import Integers

each_format = pytest.mark.parametrize("name", FORMATS)
DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))

# Few shapes, so that operations which are compiled for one format serve the others. Groups of 32,
# those of the microscaling formats, divide the rows; a padded one does not.
SHAPE, RAGGED = (64, 8), (52, 8)
MAIN: dict[str, dict[str, Any]] = {
    "default": {},
    "group": {"group_size": 16},
    "tile": {"group_size": (16, 4)},
    "pad": {"group_size": 16, "pad": True},
    "bfloat16": {"scale_dtype": "bfloat16"},
    "asymmetric": {"group_size": 16, "symmetric": False},
}
VARIANTS = {
    **MAIN,
    "powers": {"scale_dtype": "float8_e8m0fnu"},
    "double": {"group_size": 16, "scale_dtype": "float8_e4m3fn"},
    "stochastic": {"key": jax.random.key(3)},
}
# One format of each way to round, to hold codes and to hold steps.
SOME = ("int8", "uint5", "float8_e4m3fn", "float6_e2m3fn", "nf4", "nvfp4")


def is_integer(name: str) -> bool:
    """Whether a format is one of equally spaced integers with a step of its range."""
    return isinstance(FORMATS[name].grid, Integers) and name != "ternary"


def options(name: str, variant: str = "default") -> dict[str, Any] | None:
    """The arguments of a variant for a format, or None where the two do not go together."""
    given = dict(VARIANTS[variant])
    if variant == "asymmetric" and not is_integer(name):
        return None
    if name == "int1":
        # It has no positive code, so there is no symmetric grid.
        if given.get("scale_dtype", "").startswith("float8"):
            return None
        given["symmetric"] = False
    return given


def variants(name: str, among: Any = MAIN) -> dict[str, dict[str, Any]]:
    """The variants that a format has."""
    found = {variant: options(name, variant) for variant in among}
    return {variant: given for variant, given in found.items() if given is not None}


def fitting(name: str, given: Mapping[str, Any], x: Any) -> Any:
    """``x``, or its magnitudes where codes have no sign and no zero point."""
    unsigned = name.startswith("uint") and given.get("symmetric", True)
    return np.abs(x) if unsigned else x


def quantize(name: str, variant: str = "default", **more: Any) -> jc.Compression:
    """The compression of a variant."""
    return jc.quantize(name, **{**(options(name, variant) or {}), **more})


def ordinary(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Normal values of several sizes; zeros of either sign; ties; a column of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    column = np.arange(shape[-1])
    # Within what float16 has as normal numbers.
    x = x * np.where(column % 4 == 1, np.exp(rng.uniform(-4, 2, shape)), 1)
    x = np.where(column % 4 == 2, rng.integers(-4, 5, shape) * 0.5, x)
    x = np.where(column == shape[-1] - 1, 0, x)
    return _with_zeros(rng, x).astype(np.float32)


def extreme(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Each column of another size: subnormal, just normal, tiny, large, the largest there is."""
    rng, info = np.random.default_rng(seed), ml_dtypes.finfo(dtype)
    top, normal = float(info.max), float(info.smallest_normal)
    sign = rng.choice([-1.0, 1.0], shape)
    columns = [
        rng.integers(-9, 10, shape) * float(info.smallest_subnormal),
        sign * normal * rng.uniform(1, 4, shape),
        sign * np.exp(rng.uniform(np.log(normal), np.log(top), shape)),
        sign * top,
        sign * top * rng.uniform(0.9, 1, shape),
        np.where(rng.random(shape) < 0.1, sign * top, normal * rng.standard_normal(shape)),
        rng.standard_normal(shape) * 1e-6,
        np.zeros(shape),
    ]
    order = rng.permutation(shape[-1])
    x = np.stack([columns[order[d] % len(columns)][..., d] for d in range(shape[-1])], -1)
    return _with_zeros(rng, x).astype(dtype).astype(np.float32)


def _with_zeros(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    zero = np.where(rng.random(x.shape) < 0.5, 0.0, -0.0)
    return np.where(rng.random(x.shape) < 0.15, zero, x)


def dtype_of(name: str, variant: str, turn: int = 0) -> np.dtype:
    """Dtypes go round, so that three turns have all of them for each format and variant."""
    return DTYPES[(list(FORMATS).index(name) + list(VARIANTS).index(variant) + turn) % 3]


def param(name: str, variant: str, make: Any, turn: int = 0) -> jax.Array:
    """A parameter for a variant.

    Args:
        name: The format.
        variant: One of `VARIANTS`.
        make: ``make(seed, shape, dtype) -> x``.
        turn: Moves the dtypes on, not the values.
    """
    dtype = dtype_of(name, variant, turn)
    x = make(list(VARIANTS).index(variant), RAGGED if variant == "pad" else SHAPE, dtype)
    return jnp.asarray(fitting(name, options(name, variant) or {}, x).astype(dtype))


def form_of(name: str, given: Mapping[str, Any], shape: tuple[int, ...], uses: Any = None) -> Any:
    """The stored form of a float32 parameter: shapes and dtypes, from a trace alone."""

    def run(w):
        c = jc.quantize(name, **given)
        return c.compress({"w": w}, c.init({"w": w}, uses=uses and {"w": uses}))["w"]

    return jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))


def at_random(form: Any, seed: int = 0) -> Any:
    """A `QuantizedArray` of the shapes of ``form``: any codes, steps that keep values below 2."""
    rng, fmt = np.random.default_rng(seed), form.fmt

    def array(like, make):
        return None if like is None else jnp.asarray(make(like.shape).astype(like.dtype))

    def codes(shape):
        if jnp.issubdtype(form.codes.dtype, jnp.floating):
            return np.clip(
                rng.standard_normal(shape) * fmt.grid.high / 3, fmt.grid.low, fmt.grid.high
            )
        info = jnp.iinfo(form.codes.dtype)
        low, high = (
            (info.min, info.max)
            if form.block or not isinstance(fmt.grid, Integers)
            else (fmt.grid.low, fmt.grid.high)
        )
        high = high if form.block else min(high, low + 2**fmt.bits - 1)
        return rng.integers(low, high, shape, endpoint=True)

    def steps(shape):
        size = rng.uniform(0.5, 1, shape) / max(abs(fmt.grid.low), fmt.grid.high)
        return 2.0 ** np.floor(np.log2(size)) if form.scale.dtype == jnp.float8_e8m0fnu else size

    def zeros(shape):
        return rng.integers(fmt.grid.low, fmt.grid.high, shape, endpoint=True)

    if isinstance(form.scale, jc.QuantizedArray):
        share = array(form.scale.codes, lambda shape: rng.uniform(100, 448, shape))
        scale = form.scale.replace(
            codes=share, scale=array(form.scale.scale, lambda s: steps(s) / 448)
        )
    else:
        scale = array(form.scale, steps)
    return form.replace(codes=array(form.codes, codes), scale=scale, zero=array(form.zero, zeros))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Normal values in float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def view(c: jc.Compression, w: jax.Array) -> jax.Array:
    """What a compression makes of one parameter."""
    params = {"w": w}
    return c.apply(params, c.init(params))["w"]


def assert_same_bits(got: Any, want: Any, what: str = "") -> None:
    """Equal dtypes, shapes and bytes, for each leaf of a tree: -0.0 and 0.0 differ."""
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    wrong = []
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        place = f"{what} {jax.tree_util.keystr(path)}"
        assert (a.shape, a.dtype) == (b.shape, b.dtype), place
        if a.tobytes() != b.tobytes():
            at = np.argmax((a != b) | (np.signbit(a) != np.signbit(b)))
            differ = f"{a.flat[at]} and {b.flat[at]} ({a.dtype})"
            wrong.append(f"{place}: {differ}")
    assert not wrong, "\n".join(wrong)
