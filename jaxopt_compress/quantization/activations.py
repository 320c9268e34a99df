"""What products with a quantized weight do to activations, and what their derivatives do."""

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.integers import Integers

STEPS = ("dynamic", "calibrated", "learned", "clipped", "fixed")
RESIDUALS = ("rounded", "recomputed", "unrounded")


class Activations(NamedTuple):
    """How activations are rounded when they meet a weight; made by `activations`.

    Attributes:
        format: The name of the number format.
        step: Where the scale comes from.
        offset: Whether a learned offset is added.
        high: The largest value of the grid to start from, or None.
    """

    format: str
    step: str = "dynamic"
    offset: bool = False
    high: float | None = None

    @property
    def fmt(self) -> Format:
        """The number format."""
        return format_of(self.format)

    @property
    def learned(self) -> bool:
        """Whether gradients train the scale."""
        return self.step in ("learned", "clipped")

    @property
    def needs_stats(self) -> bool:
        """Whether the scale starts from statistics."""
        return self.step in ("calibrated", "learned", "clipped") and self.high is None


class Backward(NamedTuple):
    """What the backward pass of a product with a quantized weight does; made by `backward`.

    Attributes:
        format: The name of the number format of cotangents, or None: as they are.
        residuals: The factors that cotangents are multiplied with.
    """

    format: str | None = None
    residuals: str = "rounded"


def activations(
    format: str,
    step: str = "dynamic",
    *,
    offset: bool = False,
    high: float | None = None,
) -> Activations:
    r"""Rounds the activations that meet a parameter, for ``activations=`` of `quantize` and others.

    Products and convolutions of lifted functions then run on the codes of both operands where their
    formats allow it. There is one scale per row at run time with ``step="dynamic"``, and otherwise
    one for all that meets a parameter, and for each entry of a stack of its own.

    Learned scales and offsets are learned parts, trained by the optimizer
    ``compressed_training(..., learned=)``. Each update brings a scale back to within a factor of
    1024 of where it started, and replaces NaN by the start, so that it stays positive and finite.

    ``"learned"`` (LSQ) rounds as

    .. math:: \hat x = \mathrm{round}(\mathrm{clip}((x - \beta) / s, q_{min}, q_{max})) \, s + \beta

    with gradients multiplied by :math:`1 / \sqrt{n \, q_{max}}`, where :math:`n` counts the entries
    that one output sums. Without ``offset`` :math:`\beta = 0` and the scale starts at
    :math:`2 \, \mathrm{mean} |x| / \sqrt{q_{max}}`. With ``offset`` (LSQ+) it starts at
    the range seen. Padding of convolutions stays 0.

    ``"clipped"`` (PACT) learns the largest value of the grid:

    .. math:: \hat x = \mathrm{round}(\mathrm{clip}(x, 0, \alpha) / s) \, s, \quad
        s = \alpha / q_{max}, \qquad
        \frac{\partial \hat x}{\partial \alpha} = [x \ge \alpha]

    A signed format clips at the same number of steps, down to the lowest level. The compression has
    the paper's regularization, :math:`\alpha^2` summed over parameters, as its ``penalty``.

    Args:
        format: The number format, such as ``"int8"`` or ``"float8_e4m3fn"``; unsigned ones such as
            ``"uint4"`` take negative activations for 0. Learned scales are for integers of at most
            8 bits.
        step: ``"dynamic"``: the largest magnitude of each row at run time decides.
            ``"calibrated"``: the largest magnitude that ``stats`` have seen. ``"learned"`` and
            ``"clipped"``: as above, from ``stats`` on. ``"fixed"``: given by ``high``.
        offset: With ``step="learned"``: whether an offset is learned too.
        high: The largest value of the grid; with ``"fixed"``, and with ``"clipped"`` in the place
            of ``stats``.

    Returns:
        A value for ``activations=``; a format's name alone is short for its dynamic form.

    Raises:
        ValueError: Contradictory options; names what works.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.quantize("int4", activations=jc.activations("uint4", "clipped", high=7.5))
        >>> small = jc.compress({"w": jnp.ones((2, 1))}, c)
        >>> y = jc.lift(lambda p, x: x @ p["w"])(small, jnp.array([[9.0, -1.0]]))
        >>> print(f"{y.item():.3f}")
        7.000

    References:
        Esser et al., 2020, Learned Step Size Quantization. Bhalgat et al., 2020, LSQ+: Improving
        Low-Bit Quantization Through Learnable Offsets and Better Initialization. Choi et al., 2018,
        PACT: Parameterized Clipping Activation for Quantized Neural Networks.
    """
    fmt = format_of(format)
    if step not in STEPS:
        raise ValueError(f"step={step!r}; there are {', '.join(map(repr, STEPS))}")
    if not serves_rows(fmt):
        raise ValueError(
            f"activations({format!r}): activations have one scale per row, not {fmt.name}"
        )
    if offset and step != "learned":
        raise ValueError(f"offset=True goes with step='learned', not with step={step!r}")
    if (step == "fixed" and high is None) or (high is not None and step not in _WITH_HIGH):
        raise ValueError(
            f"high={high} with step={step!r}: it is the largest value of the grid, needed by "
            "'fixed' and possible with 'clipped'"
        )
    good = isinstance(high, numbers.Real) and 2.0**-100 <= high <= 2.0**100
    if high is not None and not good:
        raise ValueError(f"high={high}; it is a positive number")
    integers = isinstance(fmt.grid, Integers) and not fmt.absmean and fmt.bits <= 8
    if step not in ("dynamic", "calibrated") and not integers:
        raise ValueError(
            f"activations({format!r}, step={step!r}): this is for integers of at most 8 bits"
        )
    return Activations(format, step, offset, None if high is None else float(high))


_WITH_HIGH = ("fixed", "clipped")


def backward(format: str | None = None, *, residuals: str = "rounded") -> Backward:
    """The backward pass of products with a quantized weight, for ``backward=`` of `quantize`.

    Args:
        format: The number format that cotangents are rounded to, stochastically, before they meet
            weights and activations in the backward pass, such as ``"int8"`` or ``"float8_e5m2"``;
            needs ``activations=``; reverse mode only. By default they are left as they are.
        residuals: The factors that cotangents are multiplied with. ``"rounded"``: those of the
            forward pass, so that derivatives are those of its result. ``"recomputed"``: the same,
            but weights are rounded where they are used, and once more in the backward pass, so that
            no rounded copy of all of them is kept for a step; with ``activations=`` that is so in
            any case. ``"unrounded"``: weights and activations before rounding, for less time and a
            small error in derivatives; values that a calibrated scale clips then have the
            derivative 1.

    Returns:
        A value for ``backward=``. With other values than the defaults, the view is for lifted
        functions only.

    Raises:
        ValueError: Formats that cotangents cannot have, or contradictory options.

    Example:
        >>> import jaxopt_compress as jc
        >>> jc.quantize("int8", activations="int8", backward=jc.backward("int8")).init is not None
        True
    """
    if residuals not in RESIDUALS:
        known = ", ".join(map(repr, RESIDUALS))
        raise ValueError(f"residuals={residuals!r}; there are {known}")
    if format is not None:
        fmt = format_of(format)
        if not serves_rows(fmt) or fmt.grid.low >= 0:
            raise ValueError(
                f"backward({format!r}): cotangents have either sign and one scale per row; take "
                "'int8', 'int4' or 'float8_e5m2'"
            )
        if residuals == "unrounded":
            raise ValueError(
                "residuals='unrounded' goes with a backward pass in floats, not with "
                f"backward({format!r})"
            )
    return Backward(format, residuals)


def serves_rows(fmt: Format) -> bool:
    """Whether one scale for a row of any values, from the largest of them, makes a grid for it."""
    return fmt.group is None and not fmt.absmean and fmt.top >= 1


def as_activations(given: Activations | str | Mapping[str, Any] | None) -> Activations | None:
    """``activations=`` in its full form, checked.

    Raises:
        TypeError: It is something else.
        ValueError: As in `activations`.
    """
    if isinstance(given, str):
        return activations(given)
    if isinstance(given, Mapping):
        return activations(**given)
    if given is None or isinstance(given, Activations):
        return given
    raise TypeError(
        f"activations={given!r}; it is the name of a number format, such as 'int8', or "
        "jaxopt_compress.activations('int8', ...)"
    )


def as_backward(
    given: Backward | str | Mapping[str, Any] | None, activations: Activations | None
) -> Backward:
    """``backward=`` in its full form, checked.

    Raises:
        TypeError: It is something else.
        ValueError: As in `backward`; or a format without ``activations``.
    """
    if isinstance(given, str):
        given = backward(given)
    elif isinstance(given, Mapping):
        given = backward(**given)
    elif given is None:
        given = Backward()
    if not isinstance(given, Backward):
        raise TypeError(
            f"backward={given!r}; it is the name of a number format, such as 'int8', or "
            "jaxopt_compress.backward('int8', ...)"
        )
    if given.format is not None and activations is None:
        raise ValueError(
            f"backward={given.format!r} goes with activations=: products round both factors"
        )
    return given
