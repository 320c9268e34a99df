"""Options of quantization that contradict each other or a parameter."""

import math
import numbers
from typing import Any

import jax

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import Parameter
from jaxopt_compress.numerics.bounds import Bounds
from jaxopt_compress.quantization.activations import Activations, Backward


def check_begin(begin: int, activations: Activations | None, backward: Backward) -> None:
    """Refuses a delayed start together with products that do more than read weights."""
    if begin and (activations is not None or backward.residuals != "rounded"):
        raise ValueError(
            f"begin={begin} goes without activations= and backward=: the view before it would be "
            "of another form"
        )


def check_per(per: str, along: int | None, across: int | None) -> None:
    """Refuses a granularity that does not exist, or that contradicts groups."""
    if per not in ("channel", "tensor") or (per == "tensor" and (along or across)):
        raise ValueError(f"per={per!r}; there are 'channel', and without groups 'tensor'")


def check_types(group: Any, bounds: Any, key: Any) -> None:
    """Refuses what are no groups, bounds or keys."""
    parts = group if isinstance(group, tuple) and len(group) == 2 else (group,)
    if not all(g is None or isinstance(g, numbers.Integral) for g in parts):
        raise TypeError(f"group_size={group!r}; it is a number of entries, or a pair of them")
    if bounds is not None and not isinstance(bounds, Bounds):
        raise TypeError(f"bounds={bounds!r}; it is one of jaxopt_compress.bounds, such as mse()")
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key={key!r}; it is a random key, such as jax.random.key(0)")


def check_times(begin: int, freeze: int | None) -> None:
    """Refuses updates that no schedule counts, or grids that are frozen before they begin."""
    if begin < 0 or (freeze is not None and freeze < begin):
        raise ValueError(
            f"begin={begin}, freeze={freeze}: updates count from 0, and scales are frozen after "
            "quantization has begun"
        )


def check_group(parameter: Parameter, axis: int | None, group: int, pad: bool) -> None:
    """Refuses groups that the axis of a parameter cannot be cut into."""
    if axis is None:
        raise ValueError(
            f"{parameter.describe()} has no axis for groups of {group}: leave group_size out for "
            "this leaf, or, if they are the format's own, take a format without groups"
        )
    length = parameter.value.shape[axis]
    if length % group and not pad:
        fitting = [g for g in range(1, length + 1) if length % g == 0]
        near = sorted(fitting, key=lambda g: abs(math.log(g / group)))[:3]
        raise ValueError(
            f"group_size={group} does not divide axis {axis} of {parameter.describe()}, of length "
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
