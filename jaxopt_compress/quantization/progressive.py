"""Number formats that follow each other during training."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.compression import Compression, CompressionState, LeafState
from jaxopt_compress.compression.leaf_states import GRID
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.quantization.checks import check_known
from jaxopt_compress.quantization.state import QuantizedState, dense
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stages", "stage"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class ProgressiveState(LeafState):
    """What was decided for one parameter.

    Attributes:
        stages: The grids, in the order in which they are used.
        stage: int32, which one is now; -1 before the first one.
    """

    stages: tuple[QuantizedState, ...]
    stage: jax.Array
    kind = "quantize"
    establishes = frozenset({GRID})

    @property
    def keeps(self) -> frozenset[str]:
        """The properties that each stage keeps."""
        return frozenset.intersection(*(s.keeps for s in self.stages))

    def why_lost(self, name: str) -> str | None:
        """Names the first format that loses a property."""
        stage = next(s for s in self.stages if name not in s.keeps)
        return stage.why_lost(name)

    def apply(self, w: Leaf, learned: PyTree) -> jax.Array:
        """``w`` rounded to the present grid."""
        del learned
        rounded = [lambda w, all, i=i: all[i].apply(w, None) for i in range(len(self.stages))]
        branches = [lambda w, all: w, *rounded]
        return lax.switch(self.stage + 1, branches, dense(w), self.stages)

    def before(self, g: jax.Array) -> jax.Array:
        """``g`` itself, computed after the steps."""
        for grid in self.stages:
            g = grid.before(g)
        return g

    def compress(self, w: Leaf, learned: PyTree, path: str) -> Any:
        """Codes and grid of the present format."""
        check_known(path, self.stage)
        now = int(self.stage)
        return w if now < 0 else self.stages[now].compress(w, learned, path)


def progressive(stages: Mapping[int, Compression]) -> Compression:
    """Quantizes to one number format after the other, such as to fewer and fewer bits.

    What is stored is in the format of the last update. Until the first stage begins, parameters are
    left as they are. Only the present grid is refreshed by an update.

    Args:
        stages: The update from which on, to `quantize` without ``activations``; all choose the same
            parameters.

    Returns:
        A `Compression` that stores `QuantizedArray`.

    Raises:
        ValueError: No stages, or a negative update; in ``init``: stages of another kind, or of
            other parameters than the first one.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.progressive({0: jc.quantize("int8"), 1: jc.quantize("int2")})
        >>> params = {"w": jnp.array([[0.3], [1.0]])}
        >>> state = c.init(params)
        >>> c.compress(params, state)["w"].format
        'int8'
        >>> c.compress(params, c.update(state, params))["w"].format
        'int2'

    References:
        Zhuang et al., 2018, Towards Effective Low-bitwidth Convolutional Neural Networks.
    """
    whole = isinstance(stages, Mapping) and all(isinstance(k, int) for k in stages)
    if not whole or not all(isinstance(c, Compression) for c in stages.values()):
        raise TypeError(f"progressive({stages!r}): it takes {{update: quantize(...), ...}}")
    begins, order = sorted(stages), [stages[k] for k in sorted(stages)]
    if not order or begins[0] < 0:
        raise ValueError(f"progressive({{{', '.join(map(str, begins))}}}): updates count from 0")

    def stage_at(count: Any) -> jax.Array:
        return jnp.sum(jnp.asarray(begins) <= count, dtype=jnp.int32) - 1

    def init(
        params: PyTree, *, uses: Uses | None = None, stats: Stats | None = None
    ) -> CompressionState:
        states = [c.init(params, uses=uses, stats=stats) for c in order]
        first = states[0]
        for begin, state in zip(begins, states, strict=True):
            _check(begin, state, first)
        leaves = {
            path: ProgressiveState(tuple(s.leaves[path] for s in states), stage_at(0))
            for path in first.leaves
        }
        return CompressionState(first.count, {}, leaves, first.layouts)

    def update(
        state: CompressionState, params: PyTree, *, grads: PyTree = None
    ) -> CompressionState:
        del grads
        count = state.count + 1
        stage = stage_at(count)
        grids = {path: leaf.stages for path, leaf in state.leaves.items()}

        def refreshed(i: int) -> Any:
            now = {k: each[i] for k, each in grids.items()}
            own = state._replace(leaves=now)
            new = order[i].update(own, params).leaves
            return {k: (*each[:i], new[k], *each[i + 1 :]) for k, each in grids.items()}

        branches = [lambda: grids, *(functools.partial(refreshed, i) for i in range(len(order)))]
        grids = lax.switch(stage + 1, branches)
        # Outside of jit each one gets an array of its own: a step may donate all of them.
        leaves = {path: ProgressiveState(each, stage_at(count)) for path, each in grids.items()}
        return state._replace(count=count, leaves=leaves)

    first = order[0]
    call = f"progressive({dict(zip(begins, order, strict=True))})"
    return Compression(init, update, first.apply, first.compress, first.forward, call=call)


def _check(begin: int, state: PyTree, first: Any) -> None:
    """Refuses a stage that is not `quantize`, or chooses other parameters."""
    leaves = getattr(state, "leaves", None) or {"": None}
    for path, leaf in leaves.items():
        if not isinstance(leaf, QuantizedState):
            raise ValueError(
                f"the stage at {begin} is not jaxopt_compress.quantize of {path!r} alone: stages "
                "are of quantize, without activations= and backward="
            )
    other = sorted(set(leaves) ^ set(first.leaves))
    if other:
        raise ValueError(
            f"the stage at {begin} and the first one do not both choose {', '.join(other[:8])}: "
            "give all of them the same where="
        )
