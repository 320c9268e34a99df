"""The forms of a product of an activation's codes with those of a weight."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxopt_compress.kernels import in_kernels
from jaxopt_compress.kernels import integer_dots as dots
from jaxopt_compress.kernels.case import (
    CPU,
    EVERY,
    TPU,
    Case,
    Form,
    Run,
    always,
    codes,
    integer_kernels,
    kernels,
    nothing,
    partials,
    weight,
)
from jaxopt_compress.kernels.forms import GPUS

# Rows of a block-diagonal x up to which it is faster than one product per group.
_MAX_BLOCK_DIAGONAL_ROWS = 256


def _one_sum(form: Callable[..., jax.Array], short: bool = False) -> Run:
    """By a product of codes, scaled afterwards."""

    def run(case: Case, x_scale: jax.Array | None) -> jax.Array:
        sums = case.how.sums if short else None
        w = case.w.codes, case.w.scale
        return dots.of_one_group(case.x, *w, x_scale, form=form, sums=sums)

    return run


def _per_group(form: Callable[..., jax.Array]) -> Run:
    """By a function of codes, scales, and scales of rows."""
    return lambda case, x_scale: form(case.x, case.w.codes, case.w.scale, x_scale)


def _groups_streamed(case: Case, x_scale: jax.Array | None) -> jax.Array:
    linear = dots.group_by_group if case.outgrows_codes() else dots.per_group
    return _per_group(dots.rows_after(dots.streamed_groups(linear)))(case, x_scale)


def _float8(case: Case, x_scale: jax.Array | None) -> jax.Array:
    y = jnp.matmul(case.x, case.w.codes, preferred_element_type=case.how.sums or jnp.float32)
    return y.astype(jnp.float32) * case.w.scale


def _float8_widened(case: Case, x_scale: jax.Array | None) -> jax.Array:
    return jnp.matmul(*(a.astype(jnp.float32) for a in (case.x, case.w.codes))) * case.w.scale


def _pays(case: Case) -> bool:
    return dots.streams(case.x, case.w.codes, case.w.groups)


def _too_deep(case: Case) -> bool:
    depth = case.w.depth // case.w.groups
    return dots.exact_parts(depth, case.x.dtype, case.w.codes.dtype) > 1


def _few(case: Case) -> bool:
    return case.rows == 1 or case.w.groups * case.rows <= _MAX_BLOCK_DIAGONAL_ROWS


def _short(case: Case) -> bool:
    return case.how.sums is not None


def _some_rows(case: Case) -> bool:
    return case.rows < in_kernels.SEVERAL.stop


def _parts(kind: str) -> tuple[Form, ...]:
    """Sums that int32 does not hold."""
    why = "int32 does not hold the sum of a group"
    stored = functools.partial(dots.by_parts, form=dots.as_stored)
    return (
        Form("parts, as stored", kind, TPU, _too_deep, _per_group(stored), partials, why),
        Form("parts", kind, EVERY, _too_deep, _per_group(dots.by_parts), partials, why),
    )


# fmt: off
INTEGERS = (
    *integer_kernels("integers", "cuda"),
    *_parts("integers"),
    Form("as stored", "integers", TPU, always, _one_sum(dots.as_stored), nothing,
         "TPUs multiply int8 by int8 and by int4"),
    Form("streamed", "integers", CPU, _pays, _one_sum(dots.streamed), nothing,
         "one row, for which XLA widens the weight; packed int4; weights larger than the cache"),
    Form("laid out", "integers", CPU, always, _one_sum(dots.laid_out), codes,
         "XLA reads a transposed weight of integers entry by entry"),
    Form("widened, short sums", "integers", GPUS, _short, _one_sum(dots.widened, short=True),
         nothing, "libraries write their result in a shorter type"),
    Form("widened", "integers", EVERY, always, _one_sum(dots.widened), nothing,
         "libraries multiply int8 by int8"),
)
INTEGERS_IN_GROUPS = (
    *integer_kernels("integers in groups", "tpu", "cuda"),
    *_parts("integers in groups"),
    Form("one row per group", "integers in groups", TPU, _few,
         _per_group(functools.partial(dots.block_diagonal, form=dots.as_stored)), partials,
         "a batch of products with one row would write codes out as int32"),
    Form("product per group", "integers in groups", TPU, always,
         _per_group(functools.partial(dots.per_group, form=dots.as_stored)), nothing,
         "products per group stream, as a batch dimension"),
    Form("streamed", "integers in groups", CPU, _pays, _groups_streamed, nothing,
         "the library for int8 takes groups block by block"),
    Form("group by group", "integers in groups", EVERY, Case.outgrows_codes,
         _per_group(dots.rows_after(dots.group_by_group)), codes,
         "products of all groups together would take more memory than the codes"),
    Form("few products per group", "integers in groups", EVERY, always,
         _per_group(dots.rows_after(dots.per_group)), partials,
         "products per group take less memory than the codes"),
)
FLOAT8 = (
    *kernels("float8", "cuda", fits=_some_rows),
    Form("widened", "float8", CPU, always, _float8_widened, weight,
         "CPUs have no product of 8-bit floats"),
    Form("as stored", "float8", EVERY, always, _float8, nothing,
         "tensor units multiply 8-bit floats in half of the time"),
)
