"""What each way to compress each parameter costs in loss, measured or estimated."""

import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxopt_compress.arrays import is_compressed, materialize
from jaxopt_compress.compression import Compression, compress
from jaxopt_compress.compression.compress import Recipe
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.planning.costs import running
from jaxopt_compress.planning.fisher import check_some, squared_gradients
from jaxopt_compress.planning.kept import Kept, in_turns, tracked
from jaxopt_compress.planning.sensitivity_table import DENSE, Cell, Sensitivities
from jaxopt_compress.post_training.fingerprint import fingerprint
from jaxopt_compress.tree import Part, Where, map_named, named_leaves, nbytes, select
from jaxopt_compress.tree.paths import fit_of, is_float
from jaxopt_compress.typing import Leaf, PyTree


def sensitivities(
    loss: Callable[..., jax.Array],
    params: PyTree,
    candidates: Mapping[str, Compression],
    batches: Sequence[tuple[PyTree, ...]],
    *,
    held_out: Sequence[tuple[PyTree, ...]] | None = None,
    beside: Compression | Recipe | None = None,
    uses: Uses | None = None,
    stats: Stats | None = None,
    groups: Sequence[Where] = (),
    measured: int = 2,
    seconds: float = math.inf,
    resume: str | pathlib.Path | None = None,
    progress: bool = False,
    size: Callable[[PyTree], int] = nbytes,
) -> Sensitivities:
    r"""Estimates what each candidate costs each parameter, and measures the most useful ones.

    The estimate is the second-order term with the diagonal of the empirical Fisher information,

    .. math:: \tfrac12 \sum_i \mathrm{E}_b[g_{b,i}^2] \, (\hat w_i - w_i)^2

    for the gradients :math:`g_b` of batches. For each row the smallest candidates that no other one
    beats in bytes and estimate are then measured: the loss on held-out batches with this row
    compressed and all others as they are, or as ``beside`` makes them. Increases of several rows
    are taken to add up.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: A pytree.
        candidates: Name -> compression, of any kinds.
        batches: Tuples of arguments, of one shape: for gradients.
        held_out: Likewise, for measurements; by default ``batches``.
        beside: The compression, or recipe, of all other rows while one is measured, such as the
            uniform one that an allocation should beat. An increase is then over this row left
            dense, which takes a measurement more per row. A loss that compares with the model
            before compression has no gradient there: it needs ``beside`` for its estimates.
        uses: What `uses` found.
        stats: What `calibrate` found, for candidates that need it.
        groups: Each a choice of parameters that have to get the same candidate, such as the
            projections that a kernel fuses. Others are rows of their own.
        measured: How many candidates of each row are measured at most.
        seconds: Time after which nothing more is measured; what is left stays estimated.
        resume: A file that keeps measurements as they are made; given again with the same
            arguments, they are read from it.
        progress: Whether to show how far it is.
        size: The bytes of a tree: ``size=jc.coded_bytes`` counts those of coded files, dense and
            compressed, and the share of a budget is then one of these.

    Returns:
        The table, for `allocate`.

    Raises:
        ValueError: No candidate takes any parameter, two groups share one, or there are no batches.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"a": jax.random.normal(keys[0], (16, 16)), "b": jnp.eye(16) / 100}
        >>> def loss(params, x):
        ...     return jnp.mean((x @ params["a"] + x @ params["b"]) ** 2)
        >>> batches = [(jax.random.normal(keys[1], (64, 16)),)]
        >>> candidates = {"int2": jc.quantize("int2"), "int8": jc.quantize("int8")}
        >>> uses = jc.uses(loss, params, *batches[0])
        >>> table = jc.sensitivities(loss, params, candidates, batches, uses=uses)
        >>> recipe = jc.allocate(table, jc.bytes(0.25))
        >>> recipe.choices
        {'a': 'int8', 'b': 'int2'}

    References:
        Dong et al., 2020, HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks.
    """
    batches, held_out = list(batches), list(batches if held_out is None else held_out)
    check_some(batches=batches, held_out=held_out)
    rows = _rows(params, uses, groups)
    taken = {path for paths in rows.values() for path in paths}
    leaves = {path: w for path, w in named_leaves(params) if path in taken}
    others = params
    if beside is not None:
        others = materialize(compress(params, beside, uses=uses, stats=stats))
    squares = squared_gradients(loss, others, taken, batches)
    cells: dict[str, dict[str, Cell]] = {}
    forms: dict[tuple[str, str], dict[str, Leaf]] = {}
    for row, paths in rows.items():
        own = {path: leaves[path] for path in paths}
        if stored := _stored(own, row, candidates, uses, stats):
            cells[row] = _estimated(own, squares, stored, size, uses)
            forms |= {(row, name): stored[name] for name in _frontier(cells[row])[:measured]}
    if not cells:
        raise ValueError(f"no candidate of {sorted(candidates)} takes any of {sorted(leaves)[:8]}")
    asked = (params, dict(candidates), batches, held_out, loss, stats)
    kept = Kept(resume, fingerprint(*asked, *([] if beside is None else [others])))
    run = jax.jit(loss)
    mean = lambda tree: sum(float(run(tree, *batch)) for batch in held_out) / len(held_out)
    base, deadline = mean(params), time.monotonic() + seconds
    with_row = lambda own: mean(map_named(lambda path, w: own.get(path, w), others))
    # With all others as they were, a dense row costs what the dense model does.
    dense = {row: base for row in cells} if beside is None else {}
    for row, name in tracked(in_turns(forms), progress):
        found, small = kept.get(row, name), forms.pop((row, name))
        if found is None and time.monotonic() < deadline:
            if row not in dense:
                dense[row] = with_row({path: leaves[path] for path in rows[row]})
            found = with_row({path: materialize(w) for path, w in small.items()}) - dense[row]
            kept.put(row, name, found)
        cells[row][name] = cells[row][name]._replace(measured=found)
    chosen = {row: rows[row] for row in cells}
    held = _outside(params, chosen)
    after = None if uses is None else running(uses, held)
    return Sensitivities(cells, chosen, dict(candidates), base, size(held), after)


def _stored(
    own: dict[str, Leaf],
    row: str,
    candidates: Mapping[str, Compression],
    uses: Uses | None,
    stats: Stats | None,
) -> dict[str, dict[str, Leaf]]:
    """Name -> the leaves of a row as a candidate stores them, of those that take all of them."""
    found, part = {}, Part(own)
    for name, candidate in candidates.items():
        try:
            state = candidate.init(part, uses=uses, stats=stats)
            small = dict(candidate.compress(part, state))
        except ValueError as error:
            error.add_note(f"candidate {name!r} has to take {row!r}, or leave it out by where=")
            raise
        if all(map(is_compressed, small.values())):
            found[name] = small
    return found


def _outside(params: PyTree, rows: Mapping[str, Sequence[str]]) -> dict[str, Leaf]:
    """The arrays that are in no row."""
    inside = {path for paths in rows.values() for path in paths}
    leaves = named_leaves(params)
    return {path: w for path, w in leaves if hasattr(w, "dtype") and path not in inside}


def _estimated(
    leaves: Mapping[str, Leaf],
    squares: Mapping[str, jax.Array],
    stored: Mapping[str, Mapping[str, Leaf]],
    size: Callable[[PyTree], int],
    uses: Uses | None,
) -> dict[str, Cell]:
    """The cells of a row."""
    after = lambda tree: None if uses is None else running(uses, tree)
    cells = {DENSE: Cell(size(dict(leaves)), 0.0, 0.0, after(leaves))}
    for name, small in stored.items():
        # In float32, or squares of small weights in float16 would be 0.
        wide = lambda w: materialize(w).astype(jnp.promote_types(w.dtype, jnp.float32))
        moved = {path: wide(w) - wide(leaves[path]) for path, w in small.items()}
        terms = [float(jnp.sum(squares[p] * jnp.square(m))) for p, m in moved.items()]
        cells[name] = Cell(size(dict(small)), sum(terms) / 2, None, after(small))
    return cells


def _rows(params: PyTree, uses: Uses | None, groups: Sequence[Where]) -> dict[str, list[str]]:
    """Groups by the paths in them, and every other matrix by itself."""
    every = {p: w for p, w in named_leaves(params) if is_float(w) and len(w.shape) > 1}
    every = {p: w for p, w in every.items() if uses is None or uses.get(p)}
    rows: dict[str, list[str]] = {}
    taken: set[str] = set()
    for group in groups:
        select(params, group, "groups")
        paths = [path for path, w in every.items() if fit_of(group, path, w)]
        if both := taken & set(paths):
            raise ValueError(f"groups={group!r} takes {sorted(both)[0]!r}, as an earlier one does")
        taken |= set(paths)
        rows[" + ".join(paths)] = paths
    return rows | {path: [path] for path in every if path not in taken}


def _frontier(found: Mapping[str, Cell]) -> list[str]:
    """Candidates that no other one beats in both bytes and estimate, the smallest first."""
    size = lambda name: (found[name].bytes, found[name].estimate)
    names = sorted((name for name in found if name != DENSE), key=size)
    best, kept = math.inf, []
    for name in names:
        if found[name].estimate < best:
            best = found[name].estimate
            kept.append(name)
    return kept
