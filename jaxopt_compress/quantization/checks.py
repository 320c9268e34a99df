"""Options of quantization that contradict each other or a parameter."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays.base import is_traced
from jaxopt_compress.compression import Parameter
from jaxopt_compress.numerics.bounds import Bounds
from jaxopt_compress.numerics.formats import Format, format_of

RESIDUALS = ("rounded", "recomputed", "unrounded")


def check_inputs(inputs: str | None, steps: str, begin: int, residuals: str) -> None:
    """Refuses formats and steps that activations cannot have."""
    if inputs is not None:
        fmt = format_of(inputs)
        if not _serves_rows(fmt):
            raise ValueError(
                f"inputs={inputs!r}: activations have one step per row, not {fmt.name}"
            )
    if begin and (inputs is not None or residuals != "rounded"):
        raise ValueError(
            f"begin={begin} goes with inputs=None and residuals='rounded': what runs before would "
            "be another form"
        )
    if steps not in ("dynamic", "calibrated"):
        raise ValueError(f"input_steps={steps!r}; there are 'dynamic' and 'calibrated'")
    if steps != "dynamic" and inputs is None:
        raise ValueError(f"input_steps={steps!r} goes with inputs=, the format of activations")


def check_seen_inputs(parameter: Parameter, inputs: str) -> None:
    """Refuses an unsigned format for activations that were seen to be negative."""
    low = parameter.stats.low
    if format_of(inputs).grid.low < 0 or is_traced(low) or not low.size:
        return
    with jax.ensure_compile_time_eval():
        least = float(jnp.min(low))
    if least < 0:
        raise ValueError(
            f"what meets {parameter.describe()} goes down to {least:.3g}, which inputs={inputs!r} "
            "would take for 0; take a signed format, such as 'int8'"
        )


def check_types(group: Any, bounds: Any, key: Any) -> None:
    """Refuses what are no groups, bounds or keys."""
    parts = group if isinstance(group, tuple) and len(group) == 2 else (group,)
    if not all(g is None or isinstance(g, numbers.Integral) for g in parts):
        raise TypeError(f"group={group!r}; it is a number of entries, or a pair of them")
    if bounds is not None and not isinstance(bounds, Bounds):
        raise TypeError(f"bounds={bounds!r}; it is one of jaxopt_compress.bounds, such as mse()")
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key={key!r}; it is a random key, such as jax.random.key(0)")


def check_times(begin: int, freeze: int | None) -> None:
    """Refuses updates that no schedule counts, or grids that are frozen before they begin."""
    if begin < 0 or (freeze is not None and freeze < begin):
        raise ValueError(
            f"begin={begin}, freeze={freeze}: updates count from 0, and steps are frozen after "
            "quantization has begun"
        )


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


def check_residuals(residuals: str, gradients: str | None) -> None:
    """Refuses factors that no backward pass asks for."""
    if residuals not in RESIDUALS:
        known = ", ".join(map(repr, RESIDUALS))
        raise ValueError(f"residuals={residuals!r}; there are {known}")
    if residuals == "unrounded" and gradients is not None:
        raise ValueError(
            f"residuals='unrounded' goes with gradients=None, a backward pass in floats, not with "
            f"gradients={gradients!r}"
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


def check_known(path: str, now: jax.Array) -> None:
    """Refuses to store under a trace what depends on how many updates there were."""
    if is_traced(now):
        raise TypeError(
            f"{path!r} is stored in a form that depends on the update that its state is at: "
            "compress it outside of jit, vmap and eval_shape"
        )
