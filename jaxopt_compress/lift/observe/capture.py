"""Returning what meets parameters, and what comes of it, beside a function's own results."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.lift.observe.meetings import Meeting
from jaxopt_compress.lift.observe.observed import observed_call
from jaxopt_compress.lift.observe.tape import Key, Tape
from jaxopt_compress.tree import Where, named_leaves, select
from jaxopt_compress.typing import PyTree, Value

_NO_WAY_OUT = {
    "while": "a while loop, whose number of steps is not known: make it a scan",
    "cond": "a branch, which may not run, so that there may be no value: compute the product in "
    "front of it, or in a jnp.where",
    "shard_map": "a shard_map, where each device has a part of its own: return it from there",
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Captured:
    """An array on its way out of control flow; each has a key of its own, so none is merged."""

    array: jax.Array

    def reduce_leading(self) -> "_Captured":
        """All of it: scans stack what they return."""
        return self


def capture(
    fn: Callable[..., PyTree], at: Where, what: Literal["output", "input"] = "output"
) -> Callable[..., tuple[PyTree, dict[str, list[jax.Array]]]]:
    """Lets a function return intermediate activations too, at chosen parameters.

    It composes with `jax.jit`, `jax.grad` and `jax.vmap`: gradients flow through captured arrays to
    parameters and inputs, as if the function had returned them itself. Inside of `jax.lax.scan`, an
    array gets a new leading axis: that of the steps, stacked as the scan's own results are.

    Args:
        fn: Any JAX function, called as ``fn(params, *args, **kwargs)``.
        at: The parameters, as in `calibrate`: a glob, a predicate, or a sequence of these.
        what: ``"output"``: the result of each product, convolution or lookup, before a bias is
            added, with the axes that the operation gives it (`jax.numpy.einsum` may transpose it
            afterwards). ``"input"``: the activation that the parameter is multiplied with, as the
            function has it. Parts of a joined weight have their part of the output, and the whole
            input.

    Returns:
        A function of the same arguments that returns ``(output, captured)``: the results of ``fn``,
        and path -> a list of arrays, one for each time that the function uses the parameter, in
        program order.

    Raises:
        ValueError: ``what`` is neither of the two. In a call: ``at`` matches no parameter; one that
            it matches meets nothing, or only inside of a while loop, a branch or a `jax.shard_map`;
            a parameter is compressed.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> model = lambda params, x: jnp.maximum(x @ params["in"], 0) @ params["out"]
        >>> params = {"in": jnp.array([[1.0, -1.0]]), "out": jnp.ones((2, 1))}
        >>> output, features = jc.capture(model, at="in")(params, jnp.array([[3.0]]))
        >>> output, features["in"]
        (Array([[3.]], dtype=float32), [Array([[ 3., -3.]], dtype=float32)])
    """
    if what not in ("output", "input"):
        raise ValueError(f"what={what!r}; it is 'output' or 'input'")

    @functools.wraps(fn)
    def captured(
        params: PyTree, *args: PyTree, **kwargs: Any
    ) -> tuple[Value, dict[str, list[jax.Array]]]:
        chosen = select(params, at, "at")
        _check_dense(params)
        tape = Tape(functools.partial(_keep, what))
        output = observed_call(fn, tape, frozenset(chosen), params, args, kwargs)
        found: dict[str, list[jax.Array]] = {path: [] for path in chosen}
        for key in sorted(tape.values, key=lambda key: key.kind):
            found[key.path].append(tape.values[key].array)
        nothing = [path for path, arrays in found.items() if not arrays]
        if nothing:
            met = "product or convolution" + ", or lookup" * (what == "output")
            raise ValueError(
                f"at={at!r} matches {', '.join(map(repr, nothing))}, which no {met} reads: leave "
                "it out, and see jaxopt_compress.uses(fn, params, *args) for the "
                "operations that read each parameter"
            )
        return output, found

    return captured


def _check_dense(params: PyTree) -> None:
    for path, leaf in named_leaves(params):
        if is_compressed(leaf):
            raise ValueError(
                f"capture takes dense parameters, and {path!r} of shape {tuple(leaf.shape)} is a "
                f"{type(leaf).__name__}: pass jaxopt_compress.materialize(params), or the dense "
                "view that training uses"
            )


def _keep(what: str, tape: Tape, meeting: Meeting) -> None:
    array = meeting.result if what == "output" else meeting.activation
    if array is None:
        return
    for loop in tape.loops:
        if loop.kind in _NO_WAY_OUT:
            raise ValueError(
                f"capture cannot return what meets {meeting.path!r} of shape {meeting.shape} "
                f"inside of {_NO_WAY_OUT[loop.kind]}, at {meeting.source}"
            )
    tape.add(Key(meeting.path, (tape.place(meeting.place),)), _Captured(array()))
