"""One product with a quantized weight, in the form that suits types and compiler best."""

import functools
from typing import Any

import jax

from jaxopt_compress.kernels.case import Case, Form
from jaxopt_compress.kernels.dots import zero_product
from jaxopt_compress.kernels.float_forms import GROUPS, ONE_SCALE, TRANSPOSED, WORDS
from jaxopt_compress.kernels.forms import ACCELERATORS, on_each_platform
from jaxopt_compress.kernels.integer_forms import FLOAT8, INTEGERS, INTEGERS_IN_GROUPS
from jaxopt_compress.kernels.operand import How, Operand

# The first form of a kind that serves the platform and fits the product is taken.
FORMS = (*ONE_SCALE, *TRANSPOSED, *GROUPS, *WORDS, *INTEGERS, *INTEGERS_IN_GROUPS, *FLOAT8)
PLATFORMS = ("cpu", *ACCELERATORS)


def matmul(
    x: jax.Array, w: Operand, x_scale: jax.Array | None = None, *, how: How | None = None
) -> jax.Array:
    r"""Contracts an activation with a quantized weight, which stays as it is stored.

    .. math:: y_{mn} = r_m \sum_k x_{mk} (q_{kn} - z_{gn}) s_{gn},
        \qquad g = \lfloor k / \mathrm{group} \rfloor

    Zero points enter as :math:`-\sum_g (\sum_{k \in g} x_{mk}) z_{gn} s_{gn}`, a product over
    groups in the place of weights. Sums of integers are exact in int32, others are in float32.

    Args:
        x: ``[*batch, M, K]``: floats; or codes, integers of up to 8 bits or 8-bit floats.
        w: The weight, ``[*batch, K, N]``.
        x_scale: ``[*batch, M, 1]``, which every row is multiplied by; for integers only, or None.
        how: Types of sums and of the result; by default float32.

    Returns:
        ``[*batch, M, N]`` of type ``how.dtype``.

    Raises:
        ValueError: Shapes do not fit each other, the group or the block.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.array([[1], [2], [3], [4]], jnp.int8)
        >>> w = Operand(codes, jnp.array([[0.5], [10.0]]), format="int8", group=2)
        >>> print(matmul(jnp.ones((1, 4)), w), matmul(jnp.ones((1, 4), jnp.int8), w))
        [[71.5]] [[71.5]]
    """
    how = How() if how is None else how
    w.check(x)
    chosen = explain(x, w, how=how)
    default = chosen.pop("")
    branch = lambda form: functools.partial(run, form, how=how)
    forms = {platform: branch(form) for platform, form in chosen.items() if form is not default}
    return on_each_platform(forms, branch(default), x, w, x_scale)


def explain(x: Any, w: Operand, *, how: How | None = None) -> dict[str, Form]:
    """Which form `matmul` takes on each platform, from types alone.

    Args:
        x: The activation, or its type.
        w: The weight, or its types.
        how: As for `matmul`.

    Returns:
        Platform -> form: its name, what it writes to memory, why it is there. Under ``""`` what all
        others get.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = Operand(jnp.ones((256, 64), jnp.int8), jnp.ones((2, 64)), format="int8", group=128)
        >>> x = jax.ShapeDtypeStruct((8, 256), jnp.float32)
        >>> {platform: form.name for platform, form in explain(x, w).items()}["tpu"]
        'one row per group'
    """
    case = Case(x, w, How() if how is None else how)
    kind = [form for form in FORMS if form.kind == case.kind]

    chosen: dict[str, Form] = {}
    for platform in ("", *PLATFORMS):
        serve = [form for form in kind if not form.platforms or platform in form.platforms]
        chosen[platform] = next(form for form in serve if form.fits(case))
    return chosen


def run(
    form: Form, x: jax.Array, w: Operand, x_scale: jax.Array | None = None, *, how: How
) -> jax.Array:
    """The product in a given form, on whatever platform there is.

    Arguments and result as for `matmul`; the form has to fit.
    """
    case = Case(x, w, how)
    if w.zero is None or form.whole:
        return form.run(case, x_scale).astype(how.dtype)
    y = form.run(case, None) - zero_product(x, w.scale.astype(how.wide), w.zero)
    return (y if x_scale is None else y * x_scale).astype(how.dtype)
