"""Products with a quantized weight in the kernels of this package, where XLA would write it out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.kernels import on_each_platform, row_count, zero_product
from jaxopt_compress.kernels.decoded import STEPS, layer_of, layer_types
from jaxopt_compress.lift.products import Place, short_sums
from jaxopt_compress.numerics.codes import levels_of
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.steps import step_value

PLANES = (1, 2, 4)
# Of integers in groups XLA for TPUs fuses partial products: for a single row that is faster than
# decoding, for several it takes up to four times as long, and with many it matters little, but of
# groups smaller than these it turns the codes around.
SEVERAL, LARGE_GROUP = range(2, 129), 128


def in_planes(w: QuantizedArray) -> bool:
    """Whether codes lie in planar words that shifts to either side bring to int8."""
    grid = w.fmt.grid
    return w.block is not None and w.bits in PLANES and isinstance(grid, Integers) and grid.signed


def converts(w: QuantizedArray) -> bool:
    """Whether levels are the codes' own values, as of integers and of floats of 8 bits."""
    return isinstance(w.fmt.grid, Integers) or jnp.issubdtype(w.codes.dtype, jnp.floating)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight as it is stored, as matrices.

    Attributes:
        codes: ``[*batch, k, n]``, or words.
        steps: ``[*batch, k / group or 1, n]``, of the type that they are held in.
        outer: ``[*batch, 1, n or 1]``, the float32 steps that those are relative to, or None.
        layer: None; or a number, int32, and codes and steps have an axis of layers in front, or of
            size 1.
        transposed: Whether the last two axes of codes and steps are the other way round.
    """

    codes: jax.Array
    steps: jax.Array
    outer: jax.Array | None
    layer: jax.Array | None
    transposed: bool = dataclasses.field(metadata={"static": True})

    @property
    def stacked(self) -> bool:
        """Whether codes are read out of a stack."""
        return self.layer is not None and self.codes.shape[0] > 1

    def types(self, transposed: bool) -> tuple[Any, Any]:
        """What codes and steps of a layer are like, transposed or not."""
        return layer_types(self.codes, self.steps, self.layer, transposed != self.transposed)

    def lying(self, transposed: bool) -> "Stored":
        """The same, transposed or not; a layer is cut out of its stack if that moves axes."""
        if transposed == self.transposed:
            return self
        own = lambda a: (a if self.layer is None else layer_of(a, self.layer)).mT
        return Stored(own(self.codes), own(self.steps), self.outer, None, transposed)


def stored_matrices(
    codes: jax.Array,
    steps: Any,
    matrix: Callable[..., jax.Array],
    transposed: bool,
    place: Place | None,
) -> Stored:
    """Codes and steps, which may be quantized themselves, as ``matrix`` makes them of fields.

    Args:
        codes: Codes or words.
        steps: An array, or a `QuantizedArray`.
        matrix: ``matrix(field, transposed)`` brings a field of the weight to its form as a matrix.
        transposed: Whether to take them transposed.
        place: Where fields lie in a stack, if that does not move axes.
    """
    outer = None
    if isinstance(steps, QuantizedArray):
        steps, outer = steps.codes, matrix(steps.scale)[..., :1, :]
    elif steps.dtype.name not in STEPS:
        steps = step_value(steps)

    def held(field: jax.Array) -> jax.Array:
        own = matrix(field, transposed)
        if place is None:
            return own
        stack = place.stack_of(field)
        if stack is None or own.size != field.size:
            return own[None]
        return stack.reshape(-1, *own.shape)

    codes, steps, columns = held(codes), held(steps), -2 if transposed else -1
    shape = list(steps.shape)
    shape[columns] = codes.shape[columns]
    layer = None if place is None else place.layer.index
    return Stored(codes, jnp.broadcast_to(steps, shape), outer, layer, transposed)


def in_kernels(
    plain: Callable[..., jax.Array],
    rows: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    held: Stored,
    w: QuantizedArray,
    dtype: Any,
) -> jax.Array:
    """``plain(rows, codes, scale, zero)``; on TPUs and NVIDIA GPUs by a kernel, if it has tiles.

    Args:
        plain: The product without a kernel.
        rows: The activation, ``[*batch, m, k]``; 8-bit floats meet decoded ones as bfloat16.
        codes: What `plain` takes, ``[*batch, k, n]`` or words.
        scale: Float32 steps for `plain`, or shorter ones; ``[*batch, k / group or 1, n or 1]``.
        zero: Of that shape, or None.
        held: What kernels read.
        w: The weight that they are from.
        dtype: Type of the result.
    """
    group = rows.shape[-1] // scale.shape[-2]
    given = {"group": group, "bits": None if w.block is None else w.bits, "block": w.block}
    streams = {"tpu": _streams_on_tpus(w, held, row_count(rows)), "cuda": _streams_on_gpus(w, held)}
    x = rows if rows.dtype.itemsize > 1 else jax.ShapeDtypeStruct(rows.shape, jnp.bfloat16)
    dots = {}
    for platform, module in _modules().items():
        # As it lies, if the kernel takes it so.
        fit = lambda t, fits=module.fits: fits(x, *held.types(t), **given, transposed=t)
        ways = [t for t in (held.transposed, False) if fit(t)]
        if ways and not streams[platform]:
            options = {"lookup": not converts(w)} if platform == "cuda" else {}
            dots[platform] = functools.partial(module.decoded_dot, transposed=ways[0], **options)
    if not dots:
        return plain(rows, codes, scale, zero)
    # Levels times steps are rounded to 16 bits there: those of codes around 0 lose the least.
    middle = 0 if zero is None or w.fmt.grid.signed else 2 ** (w.bits - 1)
    # Sums that steps multiply afterwards may outgrow the range of float16.
    wide = zero is not None or (held.outer is not None and short_sums(dtype) is None)
    preferred = jnp.float32 if wide else dtype

    def decode(code: jax.Array) -> jax.Array:
        if w.block is not None and isinstance(w.fmt.grid, Integers) and w.fmt.grid.signed:
            code = code.astype(jnp.int32)
            code = jnp.where(code > w.fmt.grid.high, code - 2**w.bits, code)
        return levels_of(code, w.fmt) - middle

    def form(dot: functools.partial[jax.Array]) -> Callable[..., jax.Array]:
        def kernel(rows: Any, codes: Any, scale: Any, zero: Any, held: Stored) -> jax.Array:
            del codes
            own = held.lying(dot.keywords["transposed"])
            weight = own.codes, own.steps, decode
            rows = rows.astype(x.dtype)
            y = dot(rows, *weight, layer=own.layer, preferred=preferred, **given)
            if held.outer is not None:
                y = (y.astype(jnp.float32) * held.outer).astype(preferred)
            if zero is None:
                return y
            return y - zero_product(rows, scale, zero.astype(jnp.int32) - middle)

        return kernel

    def default(rows: Any, codes: Any, scale: Any, zero: Any, held: Stored) -> jax.Array:
        del held
        return plain(rows, codes, scale, zero).astype(preferred)

    forms = {platform: form(dot) for platform, dot in dots.items()}
    return on_each_platform(forms, default, rows, codes, scale, zero, held)


def integer_kernels(
    rows: jax.Array, held: Stored, sums: Any
) -> dict[str, Callable[..., jax.Array]]:
    """Kernels for ``integer_dot(rows, codes, scale, x_scale)``, by platform.

    In groups, the codes of which XLA for TPUs would lay out anew; and on GPUs of layers in a stack,
    which XLA would turn around.

    Args:
        rows: Codes of the activation.
        held: Codes and steps of the weight.
        sums: As for `integer_dot`.
    """
    groups = held.types(False)[1].shape[-2]
    group = rows.shape[-1] // groups
    weight = held.codes, held.steps
    given = {"group": group, "transposed": held.transposed}
    takes = {"tpu": groups > 1 and row_count(rows) > 1, "cuda": groups > 1 or held.stacked}

    def form(platform: str, module: Any) -> Callable[..., jax.Array]:
        short = groups == 1 or platform == "tpu"

        def kernel(rows: Any, codes: Any, scale: Any, *x_scale: jax.Array) -> jax.Array:
            del codes
            how = given | {"layer": held.layer, "preferred": (short and sums) or jnp.float32}
            y = module.integer_dot(rows, *weight, **how)
            return y * x_scale[0] if x_scale else y.astype(scale.dtype)

        return kernel

    lying = held.types(held.transposed)
    return {
        platform: form(platform, module)
        for platform, module in _modules().items()
        if takes[platform] and module.integer_fits(rows, *lying, **given)
    }


def _modules() -> dict[str, Any]:
    """The modules of kernels, by platform; imported late, since Pallas takes long to import."""
    from jaxopt_compress.kernels import tpu_dots

    try:
        from jaxopt_compress.kernels import gpu_dots
    except ImportError:  # JAX has announced to give up Triton, which it is written in.
        return {"tpu": tpu_dots}
    return {"tpu": tpu_dots, "cuda": gpu_dots}


def _streams_on_tpus(w: QuantizedArray, held: Stored, rows: int) -> bool:
    """Whether XLA for TPUs fuses what decodes the weight into a product, at little cost."""
    if held.transposed and w.group_size is None and w.block is None:
        return True
    if isinstance(w.fmt.grid, Integers):
        if w.block is not None:
            return in_planes(w) and not held.transposed
        return (
            w.group_size is None
            or rows == 1
            or (rows not in SEVERAL and w.group_size >= LARGE_GROUP)
        )
    return w.group_size is None and converts(w)


def _streams_on_gpus(w: QuantizedArray, held: Stored) -> bool:
    """Likewise for GPUs, where it fuses a conversion from some types and nothing else.

    Integers without a sign are not among them, and of four bits it turns a whole stack around. A
    layer it cuts out of its stack first.
    """
    return (
        not held.stacked
        and w.group_size is None
        and w.codes.dtype.name in ("int8", "float8_e4m3fn", "float8_e5m2")
    )
