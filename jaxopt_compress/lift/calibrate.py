"""Statistics of the activations that meet each parameter."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_compress.lift.interpreter import Call
from jaxopt_compress.lift.probe import Meeting, member_axes
from jaxopt_compress.lift.tape import Reducible, Tape, fold
from jaxopt_compress.lift.uses import observed_call


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "total", "outer", "low", "high"],
    meta_fields=["contracting"],
)
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the vectors that a parameter's contracted axes meet.

    ``k`` is the number of entries of the contracted axes, in row-major order of the parameter's own
    axes (of a convolution: of one patch). Parameters that are scanned over or batched, and grouped
    convolutions, have leading stack axes: one set of statistics per slice.

    Attributes:
        rows: int32 ``[*stack]``, how many vectors were seen.
        total: float32 ``[*stack, k]``, their sum.
        outer: float32 ``[*stack, k, k]``, the sum of their outer products; or None.
        low: float32 ``[*stack, k]``, their smallest entries.
        high: float32 ``[*stack, k]``, their largest entries.
        contracting: The contracted axes, negative.
    """

    rows: Any
    total: Any
    outer: Any
    low: Any
    high: Any
    contracting: tuple[int, ...]

    @property
    def mean(self) -> jax.Array:
        """``[*stack, k]``: the mean."""
        return self.total / self.rows[..., None].astype(self.total.dtype)

    @property
    def absmax(self) -> jax.Array:
        """``[*stack, k]``: the largest magnitude."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))

    @property
    def second_moment(self) -> jax.Array:
        """``[*stack, k, k]``: the mean of the outer products, ``E[x x^T]``."""
        if self.outer is None:
            raise ValueError("calibrate(..., second_moment=False) has left the second moments out")
        return self.outer / self.rows[..., None, None].astype(self.outer.dtype)


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    second_moment: bool = True,
) -> dict[str, Statistics]:
    """Runs a function over batches and gathers statistics of what meets each parameter.

    One compiled step per shape of a batch adds each batch to running sums, so memory holds one
    batch and the sums. Sharded parameters and batches are summed over all devices.

    Args:
        fn: Any JAX function, called as ``fn(params, *batch)`` if a batch is a tuple, else as
            ``fn(params, batch)``.
        params: A pytree; its floating leaves of rank 2 and more are followed.
        batches: An iterable of batches.
        second_moment: Whether to sum outer products, which takes ``k * k`` floats per parameter.

    Returns:
        Path -> `Statistics`. Parameters that no product or convolution sums over (tables that are
        only looked up) are left out. One whose axes are contracted in different ways has the entry
        ``"path axes"`` for each way after the first.

    Raises:
        ValueError: There are no batches.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> batches = [jnp.array([[1.0, -2.0]]), jnp.array([[3.0, 0.0], [2.0, 2.0]])]
        >>> stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 4))}, batches)["w"]
        >>> stats.mean, stats.absmax, stats.rows
        (Array([2., 0.], dtype=float32), Array([3., 2.], dtype=float32), Array(3, dtype=int32))
    """
    observe = functools.partial(_observe, second_moment)

    @jax.jit
    def measure(params: Any, batch: tuple[Any, ...]) -> dict[str, Reducible]:
        tape = Tape(observe)
        observed_call(fn, tape, params, batch, {})
        return tape.values

    add = jax.jit(fold, donate_argnums=0)
    sums: dict[str, Reducible] | None = None
    for batch in batches:
        seen = measure(params, batch if isinstance(batch, tuple) else (batch,))
        sums = seen if sums is None else add(sums, seen)
    if sums is None:
        raise ValueError("calibrate needs at least one batch, and batches is empty")
    return _named(sums)


def _named(sums: dict[str, Reducible]) -> dict[str, Statistics]:
    """Statistics by path, the most frequent way of contraction first."""
    named: dict[str, Statistics] = {}
    for key, value in sorted(sums.items(), key=lambda item: -int(jnp.sum(item[1].sums["rows"]))):
        path, axes = key.split("\n")
        contracting = tuple(map(int, axes.split(",")))
        fields = {**value.sums, **value.lows, **value.highs}
        statistics = Statistics(
            fields["rows"],
            fields["total"],
            fields.get("outer"),
            fields["low"],
            fields["high"],
            contracting,
        )
        named[path if path not in named else f"{path} {axes}"] = statistics
    return named


def _observe(
    second_moment: bool, tape: Tape, call: Call, meeting: Meeting, activation: Any
) -> None:
    if activation is None:
        return
    lead = 1 if meeting.op == "conv_general_dilated" else len(meeting.batch)
    for member in meeting.w.members:
        contracting = member_axes(meeting, member)[0]
        seen = activation()
        x, belongs = seen if isinstance(seen, tuple) else (seen, None)
        x = _vectors(x, meeting, member, lead)
        if x is None:
            continue
        if meeting.op == "conv_general_dilated" and x.shape[0] == 1:
            x = x[0]
        key = f"{member.path}\n{','.join(map(str, contracting))}"
        tape.add(key, _sums(x, belongs, second_moment))


def _vectors(x: jax.Array, meeting: Meeting, member: Any, lead: int) -> jax.Array | None:
    """``[*lead, rows, k]``, with the contracted axes in the order of the parameter's own."""
    axes = meeting.w.axes_of(member)
    cuts = [axes[d] for d in meeting.contracting]
    order = [cut.names for cut in cuts]
    if not all(order):
        return None
    for i, cut in enumerate(cuts):
        if cut.size is not None:
            x = lax.slice_in_dim(x, cut.start, cut.start + cut.size, axis=lead + 1 + i)
    if meeting.op != "conv_general_dilated":
        ranks = sorted(range(len(order)), key=lambda i: order[i])
        x = x.transpose(*range(lead + 1), *(lead + 1 + i for i in ranks))
    whole = 1
    for d in {n for names in order for n in names}:
        whole *= member.shape[d]
    x = x.reshape(*x.shape[: lead + 1], -1)
    if x.shape[-1] != whole:
        raise ValueError(
            f"{member.path!r} of shape {member.shape} meets activations of {x.shape[-1]} entries "
            "where "
            f"its contracted axes have {whole}: it is cut, or split over devices inside a "
            "shard_map, "
            "along an axis that is summed over; calibrate with a function that leaves it whole"
        )
    return x


def _sums(x: jax.Array, belongs: jax.Array | None, second_moment: bool) -> Reducible:
    """Sums and extremes of ``[*lead, rows, k]`` over the rows, or over those that belong."""
    x = x.astype(jnp.float32)
    if belongs is None:
        belongs = jnp.ones(x.shape[:-1], bool)
    inside = belongs[..., None]
    kept = jnp.where(inside, x, 0)
    sums = {"rows": belongs.sum(-1, dtype=jnp.int32), "total": kept.sum(-2)}
    if second_moment:
        sums["outer"] = jnp.einsum(
            "...ri,...rj->...ij", kept, kept, precision=lax.Precision.HIGHEST
        )
    low = jnp.where(inside, x, jnp.inf).min(-2, initial=jnp.inf)
    high = jnp.where(inside, x, -jnp.inf).max(-2, initial=-jnp.inf)
    return Reducible(sums, {"low": low}, {"high": high})
