"""The contract of kernels that decode a weight as they read it, and the codes in words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.kernels.forms import differentiated_as, with_rows_merged
from jaxopt_compress.numerics.packing import layout, unpack
from jaxopt_compress.numerics.steps import step_value

# The types in which kernels read steps.
STEPS = ("float32", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu")


def in_tiles(product, fits, x, codes, scale, layer, *, interpret, **given):
    """`product(x, codes, scale, layer, interpret=, **given)`, with derivatives and `jax.vmap`.

    The product, a kernel, takes codes and steps with an axis of layers in front. Derivatives are
    those of `decoded_first`, and rows that share a weight stay in one product.

    Raises:
      ValueError: if the arguments do not fit the kernel's tiles.
    """
    group, how = given["group"], {k: given[k] for k in ("bits", "block", "transposed")}
    own = layer_types(codes, scale, layer)
    if not fits(x, *own, group, **how):
        raise ValueError(
            f"no tiles for x {x.dtype}{list(x.shape)}, codes {own[0].dtype}{list(own[0].shape)} "
            f"{how}, scale {list(own[1].shape)}, group={group}: see fits"
        )
    kernel = functools.partial(product, interpret=interpret, **given)
    plain = functools.partial(decoded_first, **given)
    if layer is None:
        return differentiated_as(plain, of_single(kernel))(x, codes, scale)
    return differentiated_as(_cut_first(plain), of_layers(kernel))(x, codes, scale, layer)


def integers_in_tiles(product, fits, x_codes, codes, scale, layer, *, group, transposed, preferred):
    """As `in_tiles`, of codes that meet those of `x_codes` as integers; not to be differentiated.

    Raises:
      ValueError: if the arguments do not fit the kernel's tiles.
    """
    own = layer_types(codes, scale, layer)
    if not fits(x_codes, *own, group, transposed=transposed):
        raise ValueError(
            f"no tiles for x {x_codes.dtype}{list(x_codes.shape)}, codes {own[0].dtype}"
            f"{list(own[0].shape)}, scale {list(own[1].shape)}, {group=}, {transposed=}: see "
            "integer_fits"
        )
    given = {"group": group, "transposed": transposed, "preferred": preferred}
    kernel = functools.partial(product, decode=None, bits=None, block=None, **given)
    if layer is None:
        return of_single(kernel)(x_codes, codes, scale)
    return of_layers(kernel)(x_codes, codes, scale, layer)


def of_single(kernel):
    """`kernel(x, codes, scale, layer)` for weights outside a stack, and `jax.vmap`."""
    return with_rows_merged(lambda x, *weight: kernel(x, *(a[None] for a in weight), np.int32(0)))


def of_layers(kernel):
    """`kernel(x, codes, scale, layer)` with `jax.vmap`; of several weights layers are cut out."""
    return with_rows_merged(kernel, otherwise=_cut_first(of_single(kernel)))


def _cut_first(product):
    def of_layer(x, codes, scale, layer):
        return product(x, layer_of(codes, layer), layer_of(scale, layer))

    return of_layer


def layer_of(stack, layer):
    """Entry `layer` of a stack, or the only one."""
    at = layer if stack.shape[0] > 1 else 0
    return lax.dynamic_index_in_dim(stack, at, keepdims=False)


def layer_types(codes, scale, layer, transposed=False):
    """The shapes and types of a layer's codes and steps; without a layer they have no such axis.

    Those of transposed codes are given as if the codes were not transposed.
    """

    def own(a):
        *batch, rows, columns = a.shape if layer is None else a.shape[1:]
        shape = (*batch, columns, rows) if transposed else (*batch, rows, columns)
        return jax.ShapeDtypeStruct(shape, a.dtype)

    return own(codes), own(scale)


def decoded_first(
    x,
    codes,
    scale,
    decode,
    *,
    group,
    bits=None,
    block=None,
    transposed=False,
    preferred=jnp.float32,
):
    """The same product by way of a dense weight; arguments as for the kernels."""
    if transposed:
        codes, scale = codes.mT, scale.mT
    if bits is not None and block is not None:
        codes = unpack(codes, bits, -2, block, signed=False)
    weight = decode(codes) * jnp.repeat(step_value(scale), group, axis=-2)
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=preferred)


def codes_of_runs(rows, bits):
    """The codes of each run of a block of planar words, in order: shifts of whole arrays.

    Args:
      rows: the block's rows of words, as arrays of int32.
      bits: of a code.

    Example:
      >>> words = jnp.array([201, 5])
      >>> [run.tolist() for run in codes_of_runs([words], 4)]
      [[9, 5], [12, 0]]
    """
    how, mask = layout(bits), (1 << bits) - 1
    codes = [(row >> (j * bits)) & mask for j in range(how.whole) for row in rows]
    if how.split:
        spare = [(row >> (8 - how.spare)) << (k * how.spare) for k, row in enumerate(rows)]
        together = functools.reduce(jnp.bitwise_or, spare)
        codes += [(together >> (t * bits)) & mask for t in range(how.split)]
    return codes
