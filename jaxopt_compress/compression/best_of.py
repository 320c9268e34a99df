"""The best of several compressions, chosen for each parameter."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression.base import Compression
from jaxopt_compress.compression.checks import NeedsStats, NeedsValues, check_init
from jaxopt_compress.compression.compress import Recipe, as_compression, in_parts
from jaxopt_compress.compression.leaf_states import factor_owner
from jaxopt_compress.compression.output_error import output_error
from jaxopt_compress.compression.states import ChainState, CompressionState, describes_itself
from jaxopt_compress.lift import Statistics, Stats, Uses
from jaxopt_compress.tree import Part, named_leaves
from jaxopt_compress.typing import PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["states", "errors"], meta_fields=["paths"]
)
@dataclasses.dataclass(frozen=True)
class BestState:
    """The state of `best_of`.

    Attributes:
        states: The state of each candidate, with the parameters that it won.
        errors: Path -> float32 ``[candidates]``: relative output errors, NaN where a candidate does
            not take the parameter.
        paths: The paths that each candidate won; static.
    """

    states: tuple[PyTree, ...]
    errors: dict[str, Any]
    paths: tuple[tuple[str, ...], ...]

    @property
    def chosen(self) -> dict[str, int]:
        """Path -> the position of the winner."""
        return {path: i for i, own in enumerate(self.paths) for path in own}


def best_of(
    *compressions: Compression | Recipe, stats: Mapping[str, Sequence[Statistics]] | None = None
) -> Compression:
    r"""Compresses each parameter by the candidate with the least error on held-out data.

    The error is that of the parameter's products,

    .. math:: \sqrt{\mathrm{tr}(D^T H D) / \mathrm{tr}(W^T H W)}, \qquad
        D = \hat W - W, \quad H = E[x x^T]

    with the second moment of held-out inputs, and with that of the entries themselves for
    parameters that are only looked up. It is measured on each candidate's view, with no help from
    its method. Equal errors go to the earlier candidate.

    Args:
        *compressions: The candidates, in order.
        stats: What `calibrate` found on held-out batches. May be left out where statistics carry
            held-out ones of their own, as in `compress_in_order`.

    Returns:
        A `Compression`; its `init` needs values and cannot run under jit. `report` says which
        candidate was chosen, given its state.

    Raises:
        TypeError: A candidate is a compression of your own that is not made from a `Method`.
        ValueError: No candidates, or no held-out statistics.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 4))}
        >>> model = lambda params, x: x @ params["w"]
        >>> held_out = jc.calibrate(model, params, [jax.random.normal(jax.random.key(1), (64, 16))])
        >>> c = jc.best_of(jc.quantize("int2"), jc.quantize("int4"), stats=held_out)
        >>> jc.compress(params, c)["w"].format
        'int4'
    """
    if not compressions:
        raise ValueError("best_of() needs at least one compression")
    candidates = [as_compression(c) for c in compressions]
    held_out = stats

    def init(params: PyTree, *, uses: Uses | None = None, stats: Stats | None = None) -> BestState:
        check_init(decide, params, uses, stats)
        return decide(params, uses=uses, stats=stats)

    def decide(params: PyTree, *, uses: Uses | None, stats: Stats | None) -> BestState:
        states = [c.init(params, uses=uses, stats=stats) for c in candidates]
        for i, state in enumerate(states):
            if not describes_itself(state):
                raise TypeError(f"best_of: candidate {i} is not made from a Method")
        values = dict(named_leaves(params))
        errors: dict[str, list[Any]] = {}
        for i, (c, state) in enumerate(zip(candidates, states, strict=True)):
            view = dict(named_leaves(c.apply(params, state)))
            for path in sorted(_paths_of(state, values)):
                if is_traced(view[path]):
                    raise NeedsValues("best_of chooses by values, and cannot run under jit")
                own = errors.setdefault(path, [np.nan] * len(candidates))
                seen = _held_out(path, held_out, stats)
                own[i] = float(output_error(jnp.asarray(values[path]), view[path], seen).whole)
        best = {path: int(np.nanargmin(own)) for path, own in errors.items()}
        paths = tuple(
            tuple(path for path, chosen in best.items() if chosen == i)
            for i in range(len(candidates))
        )
        parts = tuple(_restricted(s, set(own)) for s, own in zip(states, paths, strict=True))
        return BestState(parts, {k: jnp.asarray(x, jnp.float32) for k, x in errors.items()}, paths)

    def parts_of(params: PyTree, state: BestState) -> list[Part]:
        values = dict(named_leaves(params))
        return [Part({path: values[path] for path in own}) for own in state.paths]

    return in_parts(candidates, init, parts_of, f"best_of({', '.join(map(repr, candidates))})")


def _paths_of(state: PyTree, values: Mapping[str, Any]) -> set[str]:
    """The parameters that a state made of leaf states knows."""
    if isinstance(state, ChainState):
        return set().union(*(_paths_of(inner, values) for inner in state.states))
    return {factor_owner(path, values) for path in state.leaves}


def _restricted(state: PyTree, paths: set[str]) -> PyTree:
    """The same state for some of its parameters."""
    if isinstance(state, ChainState):
        return ChainState(tuple(_restricted(inner, paths) for inner in state.states))
    own = lambda x: {k: v for k, v in x.items() if factor_owner(k, paths) in paths}
    return CompressionState(
        state.count,
        own(state.learned),
        own(state.leaves),
        own(state.layouts),
        dataclasses.replace(state.asked, left=None),
    )


def _held_out(path: str, given: Any, stats: Stats | None) -> Statistics | None:
    """The held-out statistics of one parameter; None if it has none, not being summed over.

    Raises:
        NeedsStats: There are none for any parameter.
    """
    if given is not None:
        return next(iter(given.get(path, ())), None)
    own = next(iter((stats or {}).get(path, ())), None)
    if own is not None and own.held_out is not None:
        return own.held_out
    if own is not None or not stats:
        raise NeedsStats(
            f"best_of has no held-out statistics of the activations that meet {path!r}: pass "
            "best_of(..., stats=jaxopt_compress.calibrate(fn, params, held_out_batches)), or "
            "held_out= to compress_in_order"
        )
    return None
