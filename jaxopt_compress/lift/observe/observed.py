"""Running a function with probes in the place of its parameters."""

from collections.abc import Callable, Collection

from jaxopt_compress.arrays import CompressedArray
from jaxopt_compress.lift.interpreter import Fallback, Replay
from jaxopt_compress.lift.lift import replay_call
from jaxopt_compress.lift.observe import meeting_rules, probe_rules
from jaxopt_compress.lift.observe.probe import probe
from jaxopt_compress.lift.observe.tape import Tape
from jaxopt_compress.tree import map_named
from jaxopt_compress.typing import PyTree, Value

# Imported for the rules that it registers.
del meeting_rules, probe_rules


def observed_call(
    fn: Callable[..., PyTree],
    tape: Tape,
    chosen: Collection[str],
    params: PyTree,
    args: tuple[Value, ...],
    kwargs: dict[str, PyTree],
    lost: list[Fallback] | None = None,
) -> Value:
    """Runs ``fn(params, *args, **kwargs)`` and tells ``tape.observe`` each `Meeting`.

    The observer may add to the frame of the tape, under a `Key`: what is in ``tape.values`` after
    the call has left all control flow.

    Args:
        fn: Any JAX function.
        tape: Who observes.
        chosen: The paths of the parameters that are followed.
        params: A pytree; compressed arrays in it become dense.
        args: The other arguments.
        kwargs: Likewise.
        lost: Gets where parameters are not followed any further.

    Returns:
        What ``fn`` returns.
    """

    def wrap(path: str, leaf: Value) -> Value:
        dense = leaf.materialize() if isinstance(leaf, CompressedArray) else leaf
        return probe(path, dense) if path in chosen else dense

    replay = Replay("densify", tape=tape, fallbacks=[] if lost is None else lost)
    return replay_call(fn, replay, (map_named(wrap, params), *args), kwargs)
