"""What the kernels that decode a weight on its way share: their contract, and words' codes."""

import functools

import jax.numpy as jnp

from jaxopt_compress.kernels.forms import differentiated_as, with_rows_merged
from jaxopt_compress.numerics.packing import layout, unpack
from jaxopt_compress.numerics.steps import step_value

# The types in which kernels read steps.
STEPS = ("float32", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu")


def in_tiles(product, fits, x, codes, scale, *, interpret, **given):
    """`product(x, codes, scale, interpret=, **given)`, a kernel, with derivatives and `jax.vmap`.

    Derivatives are those of `decoded_first`, and rows that share a weight stay in one product.

    Raises:
      ValueError: if the arguments do not fit the kernel's tiles.
    """
    group, bits, block = given["group"], given["bits"], given["block"]
    if not fits(x, codes, scale, group, bits=bits, block=block):
        raise ValueError(
            f"no tiles for x {x.dtype}{list(x.shape)}, codes {codes.dtype}{list(codes.shape)} "
            f"(bits={bits}, block={block}), scale {list(scale.shape)}, group={group}: see fits"
        )
    forward = with_rows_merged(functools.partial(product, interpret=interpret, **given))
    return differentiated_as(functools.partial(decoded_first, **given), forward)(x, codes, scale)


def decoded_first(x, codes, scale, decode, *, group, bits=None, block=None, preferred=jnp.float32):
    """The same product by way of a dense weight; arguments as for the kernels."""
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
