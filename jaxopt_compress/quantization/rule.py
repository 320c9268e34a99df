"""How the steps of a grid follow from values."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import QuantizedArray
from jaxopt_compress.numerics.bounds import Bounds, absmax
from jaxopt_compress.numerics.formats import Format
from jaxopt_compress.numerics.groups import by_groups
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.ranges import absmean
from jaxopt_compress.numerics.steps import (
    STEP_DTYPES,
    float8_steps,
    power_of_two_step,
    shorter_steps,
    step_of,
    within_dtype,
)
from jaxopt_compress.quantization.state import QuantizedState, dense
from jaxopt_compress.quantization.straight_through import fake_quantize
from jaxopt_compress.tree.meshes import reduced_on_auto_axes
from jaxopt_compress.typing import Leaf


class Rule(NamedTuple):
    """How steps follow from values.

    Attributes:
        bounds: Which range the grid covers.
        symmetric: Whether it is centred on 0.
        scale: The dtype that holds steps.
    """

    bounds: Bounds
    symmetric: bool
    scale: str

    def clips(self, fmt: Format) -> bool:
        """Whether the range that follows from values may leave some of them out."""
        # A step of few bits may be rounded down to one too small for the largest magnitude.
        return not fmt.absmean and (self.bounds.clips or self.scale.startswith("float8"))


def rule_of(
    fmt: Format,
    group: tuple[int | None, int | None],
    bounds: Bounds | None,
    symmetric: bool,
    scale: str | None,
) -> Rule:
    """The rule that options ask for, once they are known to be possible for some parameter."""
    usual = Bounds(absmean) if fmt.absmean else absmax()
    rule = Rule(bounds or usual, symmetric, scale or fmt.scale)
    if any(g is not None and g < 1 for g in group):
        given = group[0] if group[1] is None else group
        raise ValueError(f"group_size={given}; a group holds at least one entry")
    if rule.scale not in STEP_DTYPES:
        raise ValueError(f"scale_dtype={rule.scale!r}; scales are held in {', '.join(STEP_DTYPES)}")
    if not rule.symmetric and (not isinstance(fmt.grid, Integers) or fmt.absmean):
        raise ValueError(f"{fmt.name!r} has no zero point; leave symmetric=True")
    if not rule.symmetric and rule.scale.startswith("float8"):
        raise ValueError(f"scale_dtype={rule.scale!r} goes with symmetric=True only")
    if rule.bounds.check is not None:
        rule.bounds.check(fmt, rule.symmetric)
    if rule.symmetric and fmt.top < 1:
        raise ValueError(f"{fmt.name!r} has no positive code; pass symmetric=False")
    if fmt.absmean and rule.bounds.measure is not absmean:
        raise ValueError(f"the scale of {fmt.name!r} is the mean magnitude; leave bounds out")
    return rule


def measured(state: QuantizedState, w: Leaf, rule: Rule) -> QuantizedState:
    """The state with the steps that follow from the values of a parameter."""
    fmt = state.format

    def range_of(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        if not x.size:
            empty = jnp.zeros([1 if d in axes else n for d, n in enumerate(x.shape)])
            return empty, empty

        def view(low: jax.Array, high: jax.Array) -> jax.Array:
            return fake_quantize(x, *step_of(low, high, fmt, rule.symmetric), None, fmt)

        return rule.bounds.measure(x, axes, fmt, rule.symmetric, view)

    whole = dense(w).astype(jnp.float32)
    low, high = reduced_on_auto_axes(
        lambda x: by_groups(range_of, x, state.reduce, state.cuts), whole
    )
    decay = rule.bounds.decay
    if decay is not None:
        if state.seen is not None:
            low, high = (
                decay * old + (1 - decay) * new
                for old, new in zip(state.seen, (low, high), strict=True)
            )
        state = dataclasses.replace(state, seen=(low, high))
    relative = rule.scale == "float8_e4m3fn"
    # Among steps that share one, a group of zeros is not to set the range of all.
    step, zero = step_of(low, high, fmt, rule.symmetric, 0.0 if relative else None)
    step = within_dtype(step, zero, fmt, w.dtype)
    if rule.scale == "float8_e8m0fnu":
        step = power_of_two_step(low, high, fmt)
    elif relative:
        shared = tuple(d for d in range(-step.ndim, 0) if d not in state.stack)
        codes, outer = float8_steps(step, shared)
        step = QuantizedArray(codes, outer, None, np.dtype(np.float32), rule.scale, None)
    elif rule.scale != "float32":
        step = shorter_steps(step, rule.scale)
    return dataclasses.replace(state, scale=step, zero=zero)
