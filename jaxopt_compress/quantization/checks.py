"""Options of quantization that contradict each other or a parameter."""

import math

from jaxopt_compress.compression import Parameter
from jaxopt_compress.numerics.formats import Format, format_of


def check_inputs(inputs: str | None, steps: str, begin: int) -> None:
    """Refuses formats and steps that activations cannot have."""
    if inputs is not None:
        fmt = format_of(inputs)
        if not _serves_rows(fmt):
            raise ValueError(
                f"inputs={inputs!r}: activations have one step per row, not {fmt.name}"
            )
        if begin:
            raise ValueError("begin goes with inputs=None: what runs before would be another form")
    if steps not in ("dynamic", "calibrated"):
        raise ValueError(f"input_steps={steps!r}; there are 'dynamic' and 'calibrated'")


def _serves_rows(fmt: Format) -> bool:
    """Whether one step for a row of any values, from the largest of them, makes a grid for it."""
    return fmt.group is None and not fmt.absmean and fmt.top >= 1


def check_gradients(gradients: str | None, inputs: str | None) -> None:
    """Refuses formats that cotangents cannot have."""
    if gradients is None:
        return
    if inputs is None:
        raise ValueError(
            f"gradients={gradients!r} goes with inputs=: the backward pass of what lift rounds"
        )
    fmt = format_of(gradients)
    if not _serves_rows(fmt) or fmt.grid.low >= 0:
        raise ValueError(
            f"gradients={gradients!r}: cotangents have either sign and one step per row; take "
            "'int8', 'int4' or 'float8_e5m2'"
        )


def check_residuals(residuals: str, inputs: str | None, gradients: str | None) -> None:
    """Refuses factors that no backward pass asks for."""
    if residuals not in ("rounded", "unrounded"):
        raise ValueError(f"residuals={residuals!r}; there are 'rounded' and 'unrounded'")
    if residuals == "unrounded" and (inputs is None or gradients is not None):
        raise ValueError(
            "residuals='unrounded' goes with inputs= and gradients=None: a backward pass in floats "
            "through what lift rounds"
        )


def check_group(parameter: Parameter, axis: int | None, group: int, pad: bool) -> None:
    """Refuses groups that the axis of a parameter cannot be cut into."""
    if axis is None:
        raise ValueError(
            f"{parameter.describe()} has no axis for groups of {group}: leave group out for this "
            "leaf, or, if they are the format's own, take a format without groups"
        )
    length = parameter.value.shape[axis]
    if length % group and not pad:
        fitting = [g for g in range(1, length + 1) if length % g == 0]
        near = sorted(fitting, key=lambda g: abs(math.log(g / group)))[:3]
        raise ValueError(
            f"group={group} does not divide axis {axis} of {parameter.describe()}, of length "
            f"{length}; the nearest groups that do are {', '.join(map(str, sorted(near)))}, or "
            "pass pad=True for a shorter last group"
        )
