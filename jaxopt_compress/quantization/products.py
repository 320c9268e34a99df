"""Products of a quantized weight that round activations and cotangents too."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import InputQuantizedArray
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import (
    Decision,
    LeafMethod,
    LeafState,
    NeedsStats,
    Parameter,
    spelled,
)
from jaxopt_compress.compression.leaf_states import PRODUCTS
from jaxopt_compress.numerics.learned import REACH, least_step, scaled_gradient, within_reach
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.numerics.steps import step_of, symmetric_step
from jaxopt_compress.quantization.activations import (
    Activations,
    Backward,
    as_activations,
    as_backward,
)
from jaxopt_compress.quantization.checks import check_begin
from jaxopt_compress.quantization.state import per_stack
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "limits"],
    meta_fields=["activations", "backward", "summed"],
)
@dataclasses.dataclass(frozen=True)
class ProductState(LeafState):
    """What was decided for one parameter and its products.

    Learned are ``learned["input"]``, of the names of ``limits``, and ``learned["weight"]``, the
    learned part of the weight itself; either may be absent.

    Attributes:
        weights: The `LeafState` of the parameter itself; it has ``fake_quantized`` besides.
        limits: Of learned values, each of the rank of the parameter: the least ``"scale"``, the
            largest magnitude of an ``"offset"``, the least ``"alpha"``, which is the largest value
            of the grid. Where nothing is learned, the ``"scale"`` itself; empty if it is dynamic.
        activations: How activations are rounded, or None: they are not.
        backward: What the backward pass does.
        summed: How many activations one output sums; 1 if nothing depends on it.
    """

    weights: Any
    limits: dict[str, jax.Array]
    activations: Activations | None
    backward: Backward
    summed: int

    @property
    def kind(self) -> str:
        """The method of the weight."""
        return self.weights.kind

    @property
    def establishes(self) -> frozenset[str]:
        """What the weight does, and that products do more."""
        return self.weights.establishes | {PRODUCTS}

    @property
    def keeps(self) -> frozenset[str]:
        """What the weight keeps."""
        return self.weights.keeps

    def why_lost(self, name: str) -> str | None:
        """What the weight says."""
        return self.weights.why_lost(name)

    def before(self, g: jax.Array) -> jax.Array:
        """As for the weight."""
        return self.weights.before(g)

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """The weight alone."""
        return self.weights.apply(w, _part(learned, "weight"))

    def forward(self, w: Leaf, learned: PyTree) -> InputQuantizedArray:
        """The weight, with what its products do."""
        weight = self.weights.fake_quantized(w, _part(learned, "weight"))
        unrounded = self.backward.residuals == "unrounded"
        return self._wrapped(weight, learned).replace(
            clipping=self.activations is not None and self.activations.step == "clipped",
            gradients=self.backward.format,
            residuals="unrounded" if unrounded else "rounded",
        )

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """The stored weight, with what rounds activations."""
        small = self.weights.compress(w, _part(learned, "weight"), path)
        return small if self.activations is None else self._wrapped(small, learned)

    def _wrapped(self, weight: Any, learned: PyTree) -> InputQuantizedArray:
        now, act = _part(learned, "input") or self.limits, self.activations
        if act is None:
            return InputQuantizedArray(weight, None, None)
        if act.step == "clipped":
            # Sealed, so that the step is the same number in every program.
            step = seal(now["alpha"] * np.float32(1 / act.fmt.grid.high), "float32")
            return InputQuantizedArray(weight, step, act.format)
        if act.step != "learned":
            return InputQuantizedArray(weight, now.get("scale"), act.format)
        factor = 1 / math.sqrt(self.summed * act.fmt.grid.high)
        step = scaled_gradient(now["scale"], factor)
        offset = scaled_gradient(now["offset"], factor) if act.offset else None
        return InputQuantizedArray(weight, step, act.format, offset)

    def settled(self, learned: PyTree) -> Any:
        """The values learned for activations, positive and finite; offsets finite."""
        now, limits = learned, self.limits
        new = {k: within_reach(now[k], limits[k]) for k in now if k != "offset"}
        if "offset" in now:
            offset = jnp.where(jnp.isnan(now["offset"]), 0, now["offset"])
            new["offset"] = jnp.clip(offset, -limits["offset"], limits["offset"])
        return new


def _part(learned: PyTree, name: str) -> Any:
    return None if learned is None else learned.get(name)


def with_products(
    weights: LeafMethod,
    activations: Activations | str | None,
    backward: Backward | str | None,
    begin: int = 0,
) -> LeafMethod:
    """A method for weights, and with it what their products do.

    Args:
        weights: A method whose leaf states have ``fake_quantized``, and store `QuantizedArray`.
        activations: How activations are rounded, as methods take it; or None.
        backward: What the backward pass does, likewise.
        begin: When the method of the weights begins, which has to be at once if products do more.

    Raises:
        ValueError: ``activations`` or ``backward`` contradict each other, or ``begin``.
    """
    activations = as_activations(activations)
    backward = as_backward(backward, activations)
    check_begin(begin, activations, backward)
    if activations is None and backward == Backward():
        return weights

    def check(parameter: Parameter) -> None:
        weights.check(parameter)
        if activations is not None and activations.needs_stats:
            _check_stats(parameter, activations)

    def init(parameter: Parameter) -> Decision:
        own = weights.init(parameter)
        limits, learned, summed = {}, {}, 1
        if activations is not None and activations.step != "dynamic":
            start, summed = _start(parameter, activations)
            limits = _limits(start) if activations.learned else start
            learned = {"input": start} if activations.learned else {}
        if own.learned is not None:
            learned["weight"] = own.learned
        state = ProductState(own.state, limits, activations, backward, summed)
        return Decision(state, learned or None)

    def update(decision: Decision, count: jax.Array, parameter: Parameter) -> Decision:
        state, learned = decision
        own = Decision(state.weights, _part(learned, "weight"))
        if weights.update is not None:
            own = weights.update(own, count, parameter)
        new = {} if own.learned is None else {"weight": own.learned}
        if _part(learned, "input") is not None:
            new["input"] = state.settled(learned["input"])
        return Decision(dataclasses.replace(state, weights=own.state), new or None)

    def squares(decision: Decision, parameter: Parameter) -> jax.Array:
        del parameter
        return jnp.sum(jnp.square(decision.learned["input"]["alpha"]))

    clipped = activations is not None and activations.step == "clipped"
    return LeafMethod(check, init, update, squares if clipped else weights.penalty)


def asked_of_grid(
    name: str,
    format: Any,
    group_size: Any,
    where: Any,
    *,
    symmetric: bool = True,
    stack: int = 0,
    per: str = "channel",
    scale_dtype: str | None = None,
    activations: Activations | str | None = None,
    backward: Backward | str | None = None,
) -> str:
    """The call of a method with a grid, as `spelled` writes it: all that the stored form shows."""
    return spelled(
        name,
        format,
        group_size=group_size,
        symmetric=None if symmetric else False,
        where=where,
        stack=stack or None,
        per=None if per == "channel" else per,
        scale_dtype=scale_dtype,
        **asked_of_products(activations, backward),
    )


def asked_of_products(
    activations: Activations | str | None, backward: Backward | str | None
) -> dict[str, Any]:
    """``activations`` and ``backward`` as `spelled` writes them, however they were given."""
    rounded = as_activations(activations)
    passed = as_backward(backward, rounded)
    return {"activations": rounded, "backward": None if passed == Backward() else passed}


def _limits(start: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Not the values themselves: an array that is in a state twice cannot be donated."""
    limits = {k: least_step(x) for k, x in start.items() if k != "offset"}
    if "offset" in start:
        limits["offset"] = REACH * (jnp.abs(start["offset"]) + start["scale"])
    return limits


def _check_stats(parameter: Parameter, activations: Activations) -> None:
    """Refuses missing statistics, and an unsigned format for activations seen to be negative."""
    stats, fmt = parameter.stats, activations.fmt
    if stats is None:
        raise NeedsStats(
            f"there are no statistics of what meets {parameter.describe()}: pass "
            "stats=jaxopt_compress.calibrate(fn, params, batches), or activations with "
            "step='dynamic'. If they were passed: what is only looked up meets no activations, and "
            "calibrate warns of what it cannot measure; leave these out by where="
        )
    if stats.has("ranges"):
        stats.check_finite(parameter.describe(), "ranges")
    takes = fmt.grid.low < 0 or activations.offset or activations.step == "clipped"
    if takes or is_traced(stats.low) or not stats.low.size:
        return
    with jax.ensure_compile_time_eval():
        least = float(jnp.min(stats.low))
    if least < 0:
        raise ValueError(
            f"activations that meet {parameter.describe()} go down to {least:.3g}, which "
            f"{fmt.name!r} would take for 0; take a signed format, such as 'int8', or "
            "step='learned' with offset=True"
        )


def _start(parameter: Parameter, act: Activations) -> tuple[dict[str, jax.Array], int]:
    """The values that training starts from, and how many activations one output sums."""
    fmt, stat = act.fmt, parameter.stats
    shape, stack = tuple(parameter.value.shape), parameter.layout.stack
    if act.high is not None:
        sizes = [n if d - len(shape) in stack else 1 for d, n in enumerate(shape)]
        key, value = ("alpha", act.high) if act.learned else ("scale", act.high / fmt.grid.high)
        return {key: jnp.full(sizes, value, jnp.float32)}, 1
    shaped = lambda x: per_stack(x, shape, stack)
    if act.step == "calibrated":
        return {"scale": symmetric_step(shaped(jnp.max(stat.absmax, -1)), fmt)}, 1
    low, high = shaped(-jnp.min(stat.low, -1)), shaped(jnp.max(stat.high, -1))
    low, summed = -low, stat.low.shape[-1]
    if act.step == "clipped":
        alpha = jnp.maximum(high, -low) if fmt.grid.signed else high
        return {"alpha": jnp.where(alpha >= 2.0**-100, alpha, 1.0)}, summed
    if act.offset:
        step = (high / 2 - low / 2) / ((fmt.grid.high - fmt.grid.low) / 2)
        step = jnp.where(step >= 2.0**-100, step, 1.0)
        return {"scale": step, "offset": low - fmt.grid.low * step}, summed
    step = 2 * shaped(jnp.mean(stat.mean_magnitude, -1)) / math.sqrt(fmt.grid.high)
    step = jnp.where(step > 0, step, step_of(low, high, fmt, True)[0])
    return {"scale": jnp.where(step >= 2.0**-100, step, 1.0).astype(jnp.float32)}, summed
