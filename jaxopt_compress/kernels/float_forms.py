"""The forms of a product of a float activation with a quantized weight."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxopt_compress.kernels import dots, planar_dots
from jaxopt_compress.kernels.case import (
    CPU,
    EVERY,
    TPU,
    Case,
    Form,
    Run,
    always,
    kernels,
    nothing,
    partials,
    weight,
)
from jaxopt_compress.kernels.cpu_dots import streamed_dot, streams
from jaxopt_compress.kernels.forms import ACCELERATORS, GPUS

# Rows of a block-diagonal x up to which the additional products stay cheaper than a copy of codes.
_MAX_BLOCK_DIAGONAL_ROWS = 512


def _by_levels(form: Callable[..., jax.Array], short: bool = False, **given: Any) -> Run:
    """By a function of ``x``, levels, scales and precision."""

    def run(case: Case, x_scale: jax.Array | None) -> jax.Array:
        levels = case.w.levels(case.w.codes, case.rows)
        sums = {"sums": case.how.sums} if short else {}
        return form(case.x, levels, case.scale, case.how.precision, **sums, **given)

    return run


def _transposed_weight(case: Case, x_scale: jax.Array | None) -> jax.Array:
    levels = case.w.levels(case.w.codes, case.rows)
    return dots.transposed_weight(case.x, levels, case.scale, case.how.precision)


def _streamed(linear: Callable[..., jax.Array]) -> Run:
    """In blocks; ``linear`` is differentiated."""

    def run(case: Case, x_scale: jax.Array | None) -> jax.Array:
        read = functools.partial(case.w.levels, rows=case.rows)
        precision = case.how.precision
        return streamed_dot(
            case.x,
            case.w.codes,
            case.scale,
            decode=None if case.w.converts else read,
            precision=precision,
            linear=lambda x, codes, scale: linear(x, read(codes), scale, precision),
        )

    return run


def _in_words(form: Callable[..., jax.Array], short: bool = False) -> Run:
    def run(case: Case, x_scale: jax.Array | None) -> jax.Array:
        sums = {"sums": case.how.sums} if short else {}
        how = case.w.bits, case.how.precision
        return form(_planes_first(case), case.w.codes, case.scale, *how, **sums)

    return run


def _words_streamed(case: Case, x_scale: jax.Array | None) -> jax.Array:
    form = planar_dots.per_plane if case.w.groups == 1 else planar_dots.unpacked
    given = {"bits": case.w.bits, "precision": case.how.precision}
    linear = functools.partial(form, **given)
    x = _planes_first(case)
    return streamed_dot(x, case.w.codes, case.scale, linear=linear, **given)


def _planes_first(case: Case) -> jax.Array:
    w = case.w
    blocks = w.depth // w.groups // (w.block or 1)
    return planar_dots.planes_first(case.x, w.groups, blocks, 8 // w.bits)


def _pays(case: Case) -> bool:
    bits = None if case.w.block is None else case.w.bits
    return streams(case.rows, case.w.codes, case.w.groups, bits)


def _short(case: Case) -> bool:
    return case.how.sums is not None or case.x.dtype.itemsize < 4


def _all_short(case: Case) -> bool:
    """Whether activation, scales and sums are of one short type."""
    same = case.how.sums == case.w.scale.dtype == case.x.dtype
    return case.how.sums is not None and same and case.w.zero is None


def _few(case: Case) -> bool:
    return case.w.groups * case.rows <= _MAX_BLOCK_DIAGONAL_ROWS


def _decoded(case: Case) -> bool:
    return not case.w.converts


def _short_words(case: Case) -> bool:
    return case.w.groups == 1 and case.how.sums is not None


# fmt: off
ONE_SCALE = (
    *kernels("one scale", "tpu", "cuda"),
    Form("streamed", "one scale", CPU, _pays, _streamed(dots.scaled_after), nothing,
         "XLA would write a float32 copy of the weight, four times as large as int8"),
    Form("scales in the weight", "one scale", TPU, _all_short, _by_levels(dots.scaled_in_short),
         nothing, "XLA takes short scales out of the product by itself, and fuses more"),
    Form("short sums", "one scale", TPU, _short, _by_levels(dots.scaled_after, short=True), nothing,
         "sums over devices take as many bytes as a dense product's"),
    Form("short sums, one conversion", "one scale", GPUS, _short,
         _by_levels(dots.scaled_after, short=True, convert=dots.directly), nothing,
         "XLA for GPUs fuses int8 -> bfloat16, but not by way of float32"),
    Form("scaled after", "one scale", EVERY, always, _by_levels(dots.scaled_after), weight,
         "accelerators fuse the conversion; on CPUs the copy of a small weight stays in cache"),
)
TRANSPOSED = (
    *kernels("transposed", "cuda"),
    Form("transposed weight", "transposed", EVERY, always, _transposed_weight, nothing,
         "codes [N, K] that no kernel reads: XLA contracts them as they are"),
)
GROUPS = (
    *kernels("groups", "tpu", "cuda"),
    Form("streamed", "groups", CPU, _pays, _streamed(dots.dequantized), nothing,
         "XLA would write a float32 copy of the weight, or products per group"),
    Form("one row per group", "groups", TPU, _few, _by_levels(dots.block_diagonal), partials,
         "the weight keeps the shape in which a stack holds it, and is read from there"),
    Form("product per group", "groups", TPU, always, _by_levels(dots.per_group), nothing,
         "the scaled sum over groups is fused into the products"),
    Form("dequantized levels", "groups", GPUS, _decoded, _by_levels(dots.dequantized), weight,
         "GPUs write levels out in either form, and would write products per group besides"),
    Form("dequantized", "groups", EVERY, Case.outgrows_weight, _by_levels(dots.dequantized), weight,
         "products per group would take more memory than the dense weight"),
    Form("few products per group", "groups", EVERY, always, _by_levels(dots.per_group), partials,
         "products per group take less memory than the dense weight"),
)
WORDS = (
    *kernels("words", "tpu", "cuda"),
    Form("streamed", "words", CPU, _pays, _words_streamed, nothing,
         "words are unpacked block by block, in cache"),
    Form("short sums", "words", ACCELERATORS, _short_words,
         _in_words(planar_dots.per_plane, short=True), nothing,
         "sums over devices take as many bytes as a dense product's"),
    Form("per plane", "words", TPU, always, _in_words(planar_dots.per_plane), nothing,
         "words stay packed: plane and word are two contracted dimensions"),
    Form("unpacked", "words", EVERY, Case.outgrows_weight, _in_words(planar_dots.unpacked), weight,
         "products per group would take more memory than the dense weight"),
    Form("few products per plane", "words", EVERY, always, _in_words(planar_dots.per_plane),
         partials, "products per group take less memory than the dense weight"),
)
