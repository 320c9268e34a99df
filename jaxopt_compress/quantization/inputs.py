"""Steps of activations that are learned with the weights that they meet."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import InputQuantizedArray
from jaxopt_compress.arrays.base import is_traced
from jaxopt_compress.compression import Compression, LeafState, NeedsStats
from jaxopt_compress.compression.base import CompressionState, map_states
from jaxopt_compress.compression.checks import check_init
from jaxopt_compress.lift import layout_of, statistics_for
from jaxopt_compress.numerics.formats import Format, format_of
from jaxopt_compress.numerics.integers import Integers
from jaxopt_compress.numerics.learned import REACH, least_step, scaled_gradient, within_reach
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.numerics.steps import step_of
from jaxopt_compress.quantization.state import per_stack
from jaxopt_compress.tree import assume_layout


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "limits"],
    meta_fields=["inputs", "rule", "summed", "gradients"],
)
@dataclasses.dataclass(frozen=True)
class InputState(LeafState):
    """What was decided for one parameter and the activations that meet it.

    Learned are ``learned["input"]``, of the names of ``limits``, and ``learned["weight"]``, what
    the weights have themselves; either may be absent.

    Attributes:
        weights: The `LeafState` of the parameter itself.
        limits: Of learned values, each of the rank of the parameter: the least ``"step"``, the
            largest magnitude of an ``"offset"``, the least ``"alpha"``, which is the largest value
            of the grid. Where nothing is learned, the ``"step"`` itself.
        inputs: The number format of the activations.
        rule: ``"lsq"``, ``"lsq+"`` and ``"pact"`` learn these; ``"unit"`` none.
        summed: How many activations one output sums; 1 if nothing depends on it.
        gradients: The number format of cotangents on their way back, or None.
    """

    weights: Any
    limits: dict[str, jax.Array]
    inputs: str
    rule: str
    summed: int
    gradients: str | None
    kind = "quantize in products"
    needs_lift = True

    @property
    def keeps_zeros(self) -> bool:
        """Whether the weights do."""
        return self.weights.keeps_zeros

    @property
    def format(self) -> Any:
        """The number format of the weights."""
        return self.weights.format

    def apply(self, w: Any, learned: Any) -> jax.Array:
        """The weights alone."""
        return self.weights.apply(w, _part(learned, "weight"))

    def view(self, w: Any, learned: Any) -> InputQuantizedArray:
        """What a forward pass uses: the weights, and with them what rounds activations."""
        own = _part(learned, "weight")
        leaf, values = self.weights, self.weights.apply(w, own)
        return self._wrapped(leaf.current(own).gridded(values), learned).replace(
            gradients=self.gradients
        )

    def compress(self, w: Any, learned: Any, path: str) -> InputQuantizedArray:
        """The stored weights, and the steps."""
        return self._wrapped(self.weights.compress(w, _part(learned, "weight"), path), learned)

    def _wrapped(self, weight: Any, learned: Any) -> InputQuantizedArray:
        now = _part(learned, "input") or self.limits
        if self.rule == "pact":
            # Sealed, so that the step is the same number in every program.
            step = seal(now["alpha"] * np.float32(1 / format_of(self.inputs).grid.high), "float32")
            return InputQuantizedArray(weight, step, self.inputs, clipping=True)
        if self.rule == "unit":
            return InputQuantizedArray(weight, now["step"], self.inputs)
        factor = 1 / math.sqrt(self.summed * format_of(self.inputs).grid.high)
        step = scaled_gradient(now["step"], factor)
        offset = scaled_gradient(now["offset"], factor) if self.rule == "lsq+" else None
        return InputQuantizedArray(weight, step, self.inputs, offset)

    def settle(self, learned: Any) -> Any:
        """The learned part with steps that are positive and finite, and finite offsets."""
        settled = dict(learned)
        if "weight" in learned:
            settled["weight"] = self.weights.settle(learned["weight"])
        if "input" in learned:
            now, limits = learned["input"], self.limits
            settled["input"] = {k: within_reach(now[k], limits[k]) for k in now if k != "offset"}
            if "offset" in now:
                offset = jnp.where(jnp.isnan(now["offset"]), 0, now["offset"])
                limit = limits["offset"]
                settled["input"]["offset"] = jnp.clip(offset, -limit, limit)
        return settled


def _part(learned: Any, name: str) -> Any:
    return None if learned is None else learned.get(name)


def with_inputs(
    weights: Compression,
    inputs: str,
    rule: str,
    gradients: str | None = None,
    given: float | None = None,
) -> Compression:
    """A compression of parameters, and with it learned steps of the activations that meet them.

    Args:
        weights: How parameters are compressed: to `QuantizedArray`.
        inputs: The integer format of the activations.
        rule: ``"lsq"``, ``"lsq+"``, ``"pact"`` or ``"unit"``.
        gradients: As in `quantize`.
        given: The largest value of the grid to start from, instead of what ``stats`` have seen.
    """
    fmt = format_of(inputs)
    if not isinstance(fmt.grid, Integers) or fmt.absmean or fmt.grid.high < 1 or fmt.bits > 8:
        raise ValueError(f"inputs={inputs!r}; learned steps are for integers of at most 8 bits")

    def init(params: Any, *, uses: Any = None, stats: Any = None) -> CompressionState:
        check_init(decide, params, uses, stats)
        return decide(params, uses=uses, stats=stats)

    def decide(params: Any, *, uses: Any, stats: Any) -> CompressionState:
        inner = weights.init(params, uses=uses, stats=stats)
        if not isinstance(inner, CompressionState):
            raise TypeError("activations are for one method of quantization, not for a chain")
        leaves: dict[str, InputState] = {}
        learned: dict[str, Any] = {}

        def wrap(path: str, w: Any, leaf: Any) -> Any:
            name = f"{path!r} of shape {tuple(w.shape)}"
            _check_weights(name, leaf)
            found = layout_of(uses[path]) if uses is not None and path in uses else None
            stat = statistics_for(stats, path, found or assume_layout(w.shape))
            start, summed = _start(name, w, leaf, stat, fmt, rule, given)
            limits = start if rule == "unit" else _limits(start)
            leaves[path] = InputState(leaf, limits, inputs, rule, summed, gradients)
            if rule != "unit":
                learned[path] = start
            return w

        map_states(wrap, params, inner)
        return _joined(inner, leaves, learned)

    def update(state: CompressionState, params: Any) -> CompressionState:
        own = {k: x["weight"] for k, x in state.learned.items() if "weight" in x}
        inner = CompressionState(state.count, own, {k: s.weights for k, s in state.leaves.items()})
        inner = weights.update(inner, params)
        leaves = {
            k: dataclasses.replace(s, weights=inner.leaves[k]) for k, s in state.leaves.items()
        }
        now = {k: x["input"] for k, x in state.learned.items() if "input" in x}
        new = _joined(inner, leaves, now)
        settled = {k: leaves[k].settle(x) for k, x in new.learned.items()}
        return new._replace(learned=settled)

    return Compression(init, update, weights.apply, weights.compress)


def _limits(start: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Not the values themselves: an array that is in a state twice cannot be donated."""
    limits = {k: least_step(x) for k, x in start.items() if k != "offset"}
    if "offset" in start:
        limits["offset"] = REACH * (jnp.abs(start["offset"]) + start["step"])
    return limits


def _joined(inner: CompressionState, leaves: dict[str, Any], now: dict[str, Any]) -> Any:
    learned: dict[str, Any] = {k: {"weight": x} for k, x in inner.learned.items()}
    for path, values in now.items():
        learned[path] = {**learned.get(path, {}), "input": values}
    return CompressionState(inner.count, learned, leaves)


def _check_weights(name: str, leaf: Any) -> None:
    grid = getattr(leaf, "grid", None)
    if grid is None or grid.needs_lift or grid.active is not None:
        raise ValueError(
            f"{name}: steps of activations are learned beside quantize, lsq or dorefa, without "
            "inputs, begin and residuals of their own, not beside "
            f"{getattr(leaf, 'kind', leaf)}"
        )


def _start(
    name: str, w: Any, leaf: Any, stat: Any, fmt: Format, rule: str, given: float | None
) -> tuple[dict[str, jax.Array], int]:
    """What training starts from, and how many activations one output sums."""
    grid, shape = leaf.grid, tuple(w.shape)
    sizes = [n if d - len(shape) in grid.stack else 1 for d, n in enumerate(shape)]
    if given is not None:
        key, value = ("step", given / fmt.grid.high) if rule == "unit" else ("alpha", given)
        return {key: jnp.full(sizes, value, jnp.float32)}, 1
    if stat is None:
        raise NeedsStats(
            f"there are no statistics of what meets {name}: pass "
            "stats=jaxopt_compress.calibrate(fn, params, batches); what is only looked up meets no "
            "activations, and is left out by where="
        )
    negative = not is_traced(stat.low) and bool(np.any(np.asarray(stat.low) < 0))
    if rule == "lsq" and negative and not fmt.grid.signed:
        raise ValueError(
            f"negative activations meet {name}, which {fmt.name!r} cannot hold: take a signed "
            "format for inputs, or offset=True"
        )

    shaped = lambda x: per_stack(x, shape, grid.stack)
    low, high = shaped(-jnp.min(stat.low, -1)), shaped(jnp.max(stat.high, -1))
    low, top, summed = -low, fmt.grid.high, stat.low.shape[-1]
    if rule == "pact":
        alpha = jnp.maximum(high, -low) if fmt.grid.signed else high
        return {"alpha": jnp.where(alpha >= 2.0**-100, alpha, 1.0)}, summed
    if rule == "lsq+":
        step = (high / 2 - low / 2) / ((top - fmt.grid.low) / 2)
        step = jnp.where(step >= 2.0**-100, step, 1.0)
        return {"step": step, "offset": low - fmt.grid.low * step}, summed
    step = 2 * shaped(jnp.mean(stat.mean_magnitude, -1)) / math.sqrt(top)
    step = jnp.where(step > 0, step, step_of(low, high, fmt, True)[0])
    return {"step": jnp.where(step >= 2.0**-100, step, 1.0).astype(jnp.float32)}, summed
