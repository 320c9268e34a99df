"""Compressing layer after layer, each calibrated behind the compressed ones before it."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxopt_compress.arrays import is_compressed, materialize
from jaxopt_compress.compression import Compression, NeedsValues, as_compression
from jaxopt_compress.compression.compress import Recipe
from jaxopt_compress.compression.states import describes_itself, method_states
from jaxopt_compress.lift import Statistics, Use, measures
from jaxopt_compress.lift import uses as uses_of
from jaxopt_compress.lift.lockstep import march
from jaxopt_compress.lift.lockstep.values import Each, Index
from jaxopt_compress.lift.observe.calibrate import abstract_statistics
from jaxopt_compress.post_training.decided import Decided, stack_entries
from jaxopt_compress.post_training.fingerprint import fingerprint
from jaxopt_compress.tree import AssumedLayout, Part, map_named, named_leaves
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree, Value

MEASURES = (measures.moments(), measures.ranges(), measures.means())


def compress_in_order(
    fn: Callable[..., PyTree],
    params: PyTree,
    recipe: Compression | Recipe,
    batches: Iterable[PyTree],
    *,
    uses: Mapping[str, Sequence[Use]] | None = None,
    held_out: Iterable[PyTree] | None = None,
    measures: Sequence[measures.Measure] = MEASURES,
    resume: str | os.PathLike[str] | None = None,
    offload: bool = False,
    progress: bool = True,
) -> PyTree:
    """Compresses parameters in the order in which a function meets them.

    All batches run through the staged function together. Where it first sums over a chosen
    parameter, statistics of the activations are measured, the parameter is compressed, and the
    function goes on with the compressed one. So each layer is calibrated on activations that the
    compressed layers before it produce, for one forward pass in all, and memory holds the
    activations that are live at one place. Scans over stacked layers are walked iteration by
    iteration, and equal layers share one compiled program.

    A parameter that is used several times, such as a tied embedding, is compressed where it is
    first summed over. One that is only looked up is compressed before its first use, without
    statistics; one that a pattern names but the function never uses, at the end (without a pattern
    only parameters with a use are chosen). Other control flow (`jax.lax.while_loop`,
    `cond`, `shard_map`, and scans that use one parameter in every iteration, such as recurrent
    networks) is calibrated as a whole, with a `WholeWarning` that names the parameters.

    Args:
        fn: Any JAX function, called as ``fn(params, *batch)`` if a batch is a tuple, else as
            ``fn(params, batch)``.
        params: A pytree of arrays.
        recipe: A `Compression` or a recipe ``{glob: Compression}``. Parameters are decided one by
            one, entries of a stack too, so that methods which decide over several parameters
            together see one at a time.
        batches: Batches of equal shapes.
        uses: What `uses` found; by default it is found here.
        held_out: More batches of the same shapes, which are only measured: `best_of` chooses by
            them.
        measures: What is measured.
        resume: A folder. What has been decided is kept in it, and a later call with the same
            arguments goes on from there, to the same result bit for bit. Another function, recipe,
            other parameters or batches are refused.
        offload: Whether activations wait on the host.
        progress: Whether a line per parameter is printed to the standard error stream.

    Returns:
        The tree with compressed arrays as leaves.

    Raises:
        ValueError: What the recipe refuses for any parameter, or batches of different shapes,
            before anything is computed; or a folder of another run.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = [jax.random.normal(key, (8, 8)) for key in keys[:2]]
        >>> fn = lambda params, x: jax.nn.relu(x @ params[0]) @ params[1]
        >>> batches = [jax.random.normal(keys[2], (32, 8))]
        >>> small = jc.compress_in_order(fn, params, jc.quantize("int4"), batches, progress=False)
        >>> [leaf.format for leaf in small]
        ['int4', 'int4']
    """
    compression = as_compression(recipe)
    leaves = dict(named_leaves(params))
    own, more = _as_tuples(batches, "batches"), _as_tuples(held_out or (), "held_out")
    _check_batches([*own, *more])
    dense = materialize(params)
    found = dict(uses_of(fn, dense, *own[0]) if uses is None else uses)
    expected = abstract_statistics(fn, dense, own[0], measures)
    chosen = _chosen(compression, leaves, found, expected)
    closed, operands = _staged(fn, params, chosen, [*own, *more])
    depends = recipe, str(closed), leaves, own, more, found, measures
    told = "" if resume is None else fingerprint(*depends)
    decided = Decided(resume, told, chosen, progress)

    def compressed(path: str, w: Leaf, stats: list[Statistics]) -> Leaf:
        part = Part({path: w})
        given = {path: stats} if stats else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumedLayout)  # Said once, for all of them.
            state = compression.init(part, uses={path: list(found.get(path, ()))}, stats=given)
        return compression.compress(part, state)[path]

    def decide(
        path: str, index: Index, w: jax.Array, stats: Callable[[], list[Statistics]]
    ) -> Leaf:
        return decided.once(path, index, stats, lambda seen: compressed(path, w, seen))

    sums = lambda path: any(u.contracting and u.op != "gather" for u in found.get(path, ()))
    summed = set(filter(sums, chosen))
    march(closed, operands, summed, decide, (len(own), len(more)), measures, offload)
    small = {path: stack_entries(decided.of(path), leaves[path].shape) for path in chosen}
    for path in chosen:
        if small[path] is None:
            # Entries of different sizes have no common stack, or the function never met it.
            stats = decided.statistics(path, leaves[path].shape)
            small[path] = compressed(path, jnp.asarray(leaves[path]), stats)
    return map_named(lambda path, leaf: small.get(path, leaf), params)


def _staged(
    fn: Callable[..., PyTree],
    params: PyTree,
    chosen: Sequence[str],
    batches: Sequence[tuple[PyTree, ...]],
) -> tuple[ClosedJaxpr, list[Value]]:
    """The function as a jaxpr, and its operands for `march`."""
    keyed = named_leaves(params)
    treedef = jax.tree.structure(params, is_leaf=is_compressed)
    flat = [jax.tree.leaves(batch) for batch in batches]
    batch_def = jax.tree.structure(batches[0])
    every, n = [leaf for _, leaf in keyed] + flat[0], len(keyed)

    def varies(i: int) -> bool:
        """Whether it is an operand; numbers that all batches share stay static, as given."""
        if hasattr(every[i], "shape"):
            return True
        return i >= n and any(x[i - n] != flat[0][i - n] for x in flat)

    at = [i for i in range(len(every)) if varies(i)]

    def staged(*values: Value) -> PyTree:
        full = list(every)
        for i, value in zip(at, values, strict=True):
            full[i] = value
        batch = jax.tree.unflatten(batch_def, full[n:])
        return fn(jax.tree.unflatten(treedef, full[:n]), *batch)

    def operand(i: int) -> Value:
        if i >= n:
            return Each([x[i - n] for x in flat])
        path, leaf = keyed[i]
        dense = materialize(leaf)
        return (path, jnp.asarray(dense)) if path in chosen else dense

    closed = jax.make_jaxpr(staged)(*(materialize(every[i]) for i in at))
    return closed, [operand(i) for i in at]


def _as_tuples(batches: Iterable[PyTree], name: str) -> list[tuple[PyTree, ...]]:
    if hasattr(batches, "shape"):
        raise TypeError(f"{name} is one array; it is an iterable of batches, such as [x]")
    return [batch if isinstance(batch, tuple) else (batch,) for batch in batches]


def _check_batches(batches: Sequence[tuple[PyTree, ...]]) -> None:
    if not batches:
        raise ValueError("compress_in_order needs at least one batch, and batches is empty")
    number = lambda x: hasattr(x, "shape") or isinstance(x, bool | int | float | complex)
    of = lambda x: (jnp.shape(x), jnp.result_type(x)) if number(x) else x
    kind = lambda batch: jax.tree.map(of, batch)
    first = kind(batches[0])
    for i, batch in enumerate(batches):
        if kind(batch) != first:
            raise ValueError(
                f"batch {i} has the shapes and dtypes {kind(batch)}, and the first one {first}: "
                "all batches march together; drop or fill up the last one"
            )


def _chosen(
    compression: Compression,
    leaves: Mapping[str, Leaf],
    uses: Mapping[str, Sequence[Use]],
    stats: Mapping[str, list[Statistics]],
) -> list[str]:
    """The parameters that a compression takes, each of them checked by shapes alone."""
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in leaves.items() if is_float(x)}
    # What the whole tree is asked for is refused for the whole tree.
    try:
        every = lambda p, stats: compression.init(p, uses=dict(uses), stats=stats)
        jax.eval_shape(every, shapes, dict(stats))
    except (NeedsValues, jax.errors.JAXTypeError):
        pass
    chosen = []
    for path, w in shapes.items():
        given = {path: stats[path]} if path in stats else {}
        own = {path: list(uses.get(path, ()))}
        init = lambda p, stats, own=own: compression.init(p, uses=own, stats=stats)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumedLayout)
            try:
                state = jax.eval_shape(init, Part({path: w}), given)
            except (NeedsValues, jax.errors.JAXTypeError):
                chosen.append(path)
                continue
        if not describes_itself(state):
            raise TypeError(
                "compress_in_order takes compressions that are made from methods, whose states say "
                f"which parameters they take; this one's state is a {type(state).__name__}"
            )
        if any(s.leaves for s in method_states(state)):
            chosen.append(path)
    done = [path for path in chosen if is_compressed(leaves[path])]
    if done:
        raise TypeError(
            f"{done[0]!r} of shape {tuple(leaves[done[0]].shape)} is a "
            f"{type(leaves[done[0]]).__name__} already: compress_in_order takes dense parameters; "
            "materialize it, leave it out by where=, or compress it further with compress"
        )
    return chosen
