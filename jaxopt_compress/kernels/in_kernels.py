"""Products in the kernels of this package, which read a weight inside its stack."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.kernels.dots import zero_product
from jaxopt_compress.kernels.forms import row_count
from jaxopt_compress.kernels.operand import How, Operand, Stored
from jaxopt_compress.numerics.codes import levels_of
from jaxopt_compress.numerics.integers import Integers

# XLA for TPUs fuses partial products of integers in groups: for a single row that is faster than
# decoding, for several it takes up to four times as long, and with many it matters little, but of
# groups smaller than these it turns the codes around.
SEVERAL, LARGE_GROUP = range(2, 129), 128


def decoded_fits(platform: str, x: Any, w: Operand) -> bool:
    """Whether a kernel that decodes has tiles for a product, and XLA would write the weight out."""
    return _lying(platform, x, w) is not None and not _FUSES[platform](w, row_count(x))


def decoded(platform: str, x: jax.Array, w: Operand, how: How) -> jax.Array:
    """The product in a kernel that decodes the weight on its way.

    8-bit floats meet decoded ones as bfloat16.
    """
    held, transposed = _held(w), _lying(platform, x, w)
    assert transposed is not None
    rows, own = x.astype(_met(x).dtype), held.lying(transposed)
    lookup = {} if platform == "tpu" else {"lookup": not w.converts}
    y = _module(platform).decoded_dot(
        rows,
        own.codes,
        own.steps,
        functools.partial(_level, fields=(w.format, held.block, w.middle)),
        layer=own.layer,
        transposed=transposed,
        preferred=how.dtype,
        interpret=how.interpret,
        **_cut(w),
        **lookup,
    )
    if held.outer is not None:
        y = (y.astype(jnp.float32) * held.outer).astype(how.dtype)
    if w.zero is None:
        return y
    return y - zero_product(rows, w.scale, w.zero.astype(jnp.int32) - w.middle)


def integers_fit(platform: str, x: Any, w: Operand) -> bool:
    """Whether a kernel in which integers meet has tiles, and XLA would lay codes out anew.

    So it would on TPUs with groups, but for a single row, and on GPUs with groups, and for layers
    of a stack, which it would turn around.
    """
    if w.held is None or _module(platform) is None:
        return False
    grouped = w.groups > 1
    pays = grouped and row_count(x) > 1 if platform == "tpu" else grouped or w.held.stacked
    types = w.held.types(w.held.transposed)
    group, transposed = w.depth // w.groups, w.held.transposed
    return pays and _module(platform).integer_fits(x, *types, group, transposed=transposed)


def integers(
    platform: str, x: jax.Array, w: Operand, how: How, x_scale: jax.Array | None
) -> jax.Array:
    """The product in a kernel in which integers meet, summed in int32."""
    held = _held(w)
    short = w.groups == 1 or platform == "tpu"
    y = _module(platform).integer_dot(
        x,
        held.codes,
        held.steps,
        group=w.depth // w.groups,
        layer=held.layer,
        transposed=held.transposed,
        preferred=(short and how.sums) or jnp.float32,
        interpret=how.interpret,
    )
    return y.astype(w.scale.dtype) if x_scale is None else y * x_scale


def _held(w: Operand) -> Stored:
    assert w.held is not None
    return w.held


def _lying(platform: str, x: Any, w: Operand) -> bool | None:
    """Whether the kernel reads the weight transposed, if it has tiles for it in either way."""
    if w.held is None or _module(platform) is None:
        return None
    fits = functools.partial(_module(platform).fits, _met(x))
    ways = (w.held.transposed, False)  # In its own layout, if that fits.
    return next((t for t in ways if fits(*w.held.types(t), transposed=t, **_cut(w))), None)


def _cut(w: Operand) -> dict[str, int | None]:
    block = _held(w).block
    return {"group": w.depth // w.groups, "bits": block and w.bits, "block": block}


def _met(x: Any) -> Any:
    """The activation, as the weight meets it."""
    return x if x.dtype.itemsize > 1 else jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)


def _level(code: jax.Array, fields: tuple[str, int | None, int]) -> jax.Array:
    """The level of a code that a kernel has read, less the middle of all."""
    name, block, middle = fields
    w = Operand(code, code, format=name)
    if block is not None and isinstance(w.fmt.grid, Integers) and w.fmt.grid.signed:
        code = code.astype(jnp.int32)
        code = jnp.where(code > w.fmt.grid.high, code - 2**w.bits, code)
    return levels_of(code, w.fmt) - middle


@functools.cache
def _module(platform: str) -> Any:
    """The kernels of a platform; imported late, since Pallas takes long to import."""
    if platform == "tpu":
        from jaxopt_compress.kernels import tpu_dots

        return tpu_dots
    try:
        from jaxopt_compress.kernels import gpu_dots
    except ImportError:  # JAX has announced to give up Triton, which it is written in.
        return None
    return gpu_dots


def _fuses_on_tpus(w: Operand, rows: int) -> bool:
    """Whether XLA for TPUs fuses what decodes the weight into a product, at little cost."""
    held, grouped = _held(w), w.group is not None
    if held.transposed and not grouped and held.block is None:
        return True
    if isinstance(w.fmt.grid, Integers):
        if held.block is not None:
            return w.block is not None and not held.transposed
        return not grouped or rows == 1 or (rows not in SEVERAL and (w.group or 0) >= LARGE_GROUP)
    return not grouped and w.converts


def _fuses_on_gpus(w: Operand, rows: int) -> bool:
    """Likewise for GPUs, where it fuses a conversion from some types and nothing else.

    Integers without a sign are not among them, and of four bits it turns a whole stack around. A
    layer it cuts out of its stack first.
    """
    del rows
    fused = _held(w).codes.dtype.name in ("int8", "float8_e4m3fn", "float8_e5m2")
    return not _held(w).stacked and w.group is None and fused


_FUSES = {"tpu": _fuses_on_tpus, "cuda": _fuses_on_gpus}
