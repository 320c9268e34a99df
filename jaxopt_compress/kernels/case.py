"""A product as its types describe it, and what the forms that it may take have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_compress.kernels import in_kernels
from jaxopt_compress.kernels.forms import row_count
from jaxopt_compress.kernels.operand import How, Operand

CPU, TPU, EVERY = ("cpu",), ("tpu",), ()


class Case(NamedTuple):
    """A product; its types alone decide its form.

    Attributes:
        x: The activation, or its codes.
        w: The weight.
        how: How it is computed.
    """

    x: Any
    w: Operand
    how: How

    @property
    def rows(self) -> int:
        """M; many where it is symbolic."""
        return row_count(self.x)

    @property
    def kind(self) -> str:
        """The kind of product: codes of activations, or floats, and the layout of the weight."""
        if jnp.issubdtype(self.x.dtype, jnp.integer):
            return "integers" if self.w.groups == 1 else "integers in groups"
        if self.x.dtype.itemsize == 1:
            return "float8"
        if self.w.transposed:
            return "transposed"
        if self.w.block is not None:
            return "words"
        return "groups" if self.w.groups > 1 else "one scale"

    @property
    def scale(self) -> jax.Array:
        """Scales, of the type of sums."""
        return self.w.scale.astype(self.how.wide)

    def outgrows_weight(self) -> bool:
        """Whether float32 products per group take more memory than the dense weight would."""
        grouped = self.w.groups > 1
        return grouped and 4 * self.w.groups * self.rows > self.w.depth * self.x.dtype.itemsize

    def outgrows_codes(self) -> bool:
        """Whether int32 products per group take more memory than the codes do."""
        return 4 * self.w.groups * self.rows > self.w.depth


Run = Callable[[Case, Any], jax.Array]


class Form(NamedTuple):
    """One way to compute a product.

    Attributes:
        name: Unique within its kind.
        kind: What it multiplies, as `Case.kind`.
        platforms: For which compilers; all if empty.
        fits: ``fits(case)``, whether it serves a product.
        run: ``run(case, x_scale)``, the product.
        writes: ``writes(case)``: bytes that each product of a batch sends to memory on the way.
        why: Why it is there.
        whole: Whether ``run`` takes zero points into account; otherwise they are subtracted.
    """

    name: str
    kind: str
    platforms: tuple[str, ...]
    fits: Callable[[Case], bool]
    run: Run
    writes: Callable[[Case], int]
    why: str
    whole: bool = False


def always(case: Case) -> bool:
    """Fits what no form before it does."""
    del case
    return True


def nothing(case: Case) -> int:
    """Writes nothing on the way."""
    del case
    return 0


def weight(case: Case) -> int:
    """Writes the dense weight."""
    return case.w.depth * case.w.columns * case.x.dtype.itemsize


def codes(case: Case) -> int:
    """Writes codes, a byte each."""
    return case.w.depth * case.w.columns


def partials(case: Case) -> int:
    """Writes a product per group."""
    return 4 * case.w.groups * case.rows * case.w.columns


def kernels(kind: str, *platforms: str, fits: Callable[[Case], bool] = always) -> tuple[Form, ...]:
    """Kernels that decode a weight on its way."""

    def kernel(platform: str) -> Form:
        def pays(case: Case) -> bool:
            held = case.w.held is not None
            return held and fits(case) and in_kernels.decoded_fits(platform, case.x, case.w)

        def run(case: Case, x_scale: jax.Array | None) -> jax.Array:
            del x_scale
            return in_kernels.decoded(platform, case.x, case.w, case.how)

        why = "XLA would write the decoded weight, or a layer cut out of its stack"
        return Form(f"{platform} kernel", kind, (platform,), pays, run, nothing, why, whole=True)

    return tuple(map(kernel, platforms))


def integer_kernels(kind: str, *platforms: str) -> tuple[Form, ...]:
    """Kernels in which integers meet."""

    def kernel(platform: str) -> Form:
        def pays(case: Case) -> bool:
            return in_kernels.integers_fit(platform, case.x, case.w)

        def run(case: Case, x_scale: jax.Array | None) -> jax.Array:
            return in_kernels.integers(platform, case.x, case.w, case.how, x_scale)

        why = "XLA would lay out anew the codes of groups, and on GPUs those of all layers"
        return Form(f"{platform} kernel", kind, (platform,), pays, run, nothing, why)

    return tuple(map(kernel, platforms))
