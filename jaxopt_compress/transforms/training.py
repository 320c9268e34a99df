"""Training compressed parameters with any optax optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_compress.compression import Compression, TrainingState, as_compression
from jaxopt_compress.compression.compress import Recipe, given_uses
from jaxopt_compress.compression.states import learned_parts, method_states, replace_learned
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.transforms.gradients import at_view, gradients_of_values
from jaxopt_compress.transforms.resets import check_resting, resting, to_zero, without_moments
from jaxopt_compress.tree import combine, map_named, named_leaves, partition
from jaxopt_compress.tree.paths import is_float
from jaxopt_compress.typing import Leaf, PyTree


def compressed_training(
    inner: optax.GradientTransformation,
    compression: Compression | Recipe,
    learned: optax.GradientTransformation | None = None,
    uses: Uses | None = None,
    stats: Stats | None = None,
    penalty: float | optax.Schedule = 0.0,
    layout: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer, so that it trains parameters through their compressed view.

    The loss is taken at ``compression.view(params, opt_state)``; ``update`` pulls its gradients
    back through the compression to the parameters (and to learned parts, such as factors), lets
    ``inner`` update them, and advances the compression from the ``params`` passed in. A parameter
    that `low_rank` replaces by factors, and an integer one, gets no update, whatever ``inner``
    decays; gradients of ``allow_int=True`` may be passed as they are. Entries that
    ``prune(pruned="zero")`` holds at 0 are set to 0, and so are their moments, before ``inner``
    reads them: a wrapper that scales these updates only moves entries towards it. Where a wrapper
    compares gradients with parameters and the view is for lifted functions, see `weight_gradients`.

    Args:
        inner: Any optax optimizer, but one that accumulates gradients: for that use
            ``optax.MultiSteps(compressed_training(...))``, so that schedules count updates.
        compression: A `Compression`, or a recipe ``{glob: Compression}``, whose view is that of
            ``chain(recipe)``.
        learned: The optimizer of learned parts; ``inner`` by default.
        uses: What `uses` found, so that channels and groups follow the function.
        stats: What `calibrate` found, for compressions that ask for it.
        penalty: The weight of the compression's own ``penalty`` in the loss; or a schedule that
            gives it for the number of updates so far. The loss itself need not know of it: its
            gradient is added here.
        layout: As in `jaxopt_compress.compress`, in the place of ``uses``.

    Returns:
        An optax transformation; extra arguments go to ``inner``. Its state holds arrays only.

    Raises:
        ValueError: A ``penalty`` for a compression without one; in ``init``, if ``inner``
            accumulates gradients; in ``update``, without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxopt_compress as jc
        >>> c = jc.quantize("int8")
        >>> tx = jc.compressed_training(optax.sgd(0.1), c)
        >>> params = {"w": jnp.ones((4, 2))}
        >>> opt_state = tx.init(params)
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
        >>> grads = jax.grad(loss)(c.view(params, opt_state), jnp.ones((1, 4)))
        >>> updates, opt_state = tx.update(grads, opt_state, params)
        >>> optax.apply_updates(params, updates)["w"].shape
        (4, 2)
    """
    compression = as_compression(compression)
    outer = optax.with_extra_args_support(inner)
    trainer = outer if learned is None else optax.with_extra_args_support(learned)
    weight = penalty if callable(penalty) else lambda count: penalty
    penalized = callable(penalty) or penalty != 0
    if penalized and compression.penalty is None:
        raise ValueError(
            f"penalty={penalty}: {compression!r} has no penalty to weigh; leave it out"
        )

    def init_fn(params: PyTree) -> TrainingState:
        found = given_uses(params, uses, layout)
        state = compression.init(params, uses=found, stats=stats)
        inner_state, parts = outer.init(params), learned_parts(state)
        _check_scheduled(penalty, state)
        check_resting(params, state)
        _refuse_accumulation(inner_state)
        trained = trainer.init(parts) if jax.tree.leaves(parts) else None
        return TrainingState(inner_state, trained, state)

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "compressed_training needs the params: tx.update(grads, state, params)"
            )
        parts = learned_parts(state.compression)
        new, trained = state.compression, state.learned
        # The compression sees the gradients of the loss, without its own penalty.
        grads = gradients_of_values(updates)
        factor = weight(_count(new)) if penalized else None
        updates, part_updates = _pull_back(compression, updates, state, params, parts, factor)
        if trained is not None:
            part_updates, trained = trainer.update(part_updates, trained, parts, **extra_args)
            trained_parts: Any = optax.apply_updates(parts, part_updates)
            # Grids of factors follow the factors that the next view is made of.
            new = replace_learned(new, trained_parts)
        new = compression.update(new, params, grads=grads)
        # What comes back now begins at 0, as what the gradients were taken at had it.
        before = resting(state.compression)
        inner_state = without_moments(before, params, state.inner)
        updates = _before(updates, new)
        updates, inner_state = outer.update(updates, inner_state, params, **extra_args)
        ends = {path: mask | before[path] for path, mask in resting(new).items()}
        updates = to_zero(ends, _hold(updates, params, new), params)
        return updates, TrainingState(inner_state, trained, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _pull_back(
    compression: Compression,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    parts: PyTree,
    factor: Any,
) -> tuple[Any, Any]:
    """Gradients at the view as gradients at parameters and learned parts, with the penalty's."""
    floats, rest = partition(params)

    def view(floats: PyTree, parts: PyTree) -> tuple[PyTree, PyTree]:
        learned, whole = replace_learned(state.compression, parts), combine(floats, rest)
        seen = partition(compression.loss_view(whole, learned))[0]
        if factor is None or compression.penalty is None:
            return seen, None
        return seen, compression.penalty(whole, learned)

    (seen, cost), pull = jax.vjp(view, floats, parts)
    hole = lambda x: x is None
    grads = at_view(grads, seen, parts)
    at_floats = jax.tree.map(lambda x, g: None if x is None else g, seen, grads, is_leaf=hole)
    cast = lambda g, x: g.astype(x.dtype)
    share = None if cost is None else jnp.asarray(factor, cost.dtype)
    back, part_grads = pull((jax.tree.map(cast, at_floats, seen), share))
    back = jax.tree.map(cast, back, at_floats)
    still = lambda x: None if x is None else jnp.zeros_like(x)
    return combine(back, jax.tree.map(still, rest, is_leaf=hole)), part_grads


def _count(state: PyTree) -> jax.Array:
    """How many updates a compression has seen."""
    return next((s.count for s in method_states(state)), jnp.zeros((), jnp.int32))


def _before(grads: PyTree, new: Leaf) -> PyTree:
    """Gradients that wait for new masks and steps, which read the parameters.

    If these and the new parameters, which follow from the gradients, did not depend on each other,
    XLA would copy each parameter to be free to compute them in either order.
    """
    leaves = {}
    for state in method_states(new):
        leaves |= {k: s.before for k, s in state.leaves.items()}
    return map_named(lambda path, g: leaves[path](g) if path in leaves else g, grads)


def _hold(updates: PyTree, params: PyTree, new: Leaf) -> PyTree:
    """No updates, such as from weight decay, for parameters that gradients do not reach.

    These are integers, and parameters that learned factors stand for.
    """
    pairs = [pair for state in method_states(new) for pair in state.leaves.items()]
    held = {path for path, state in pairs if state.replaces}
    held |= {path for path, leaf in named_leaves(params) if not is_float(leaf)}
    return map_named(lambda path, u: jnp.zeros_like(u) if path in held else u, updates)


def _check_scheduled(penalty: float | optax.Schedule, state: PyTree) -> None:
    """Refuses a schedule of the penalty where no updates are counted."""
    if callable(penalty) and not method_states(state):
        raise ValueError(
            "a schedule of the penalty follows the updates that a compression counts, and the "
            f"{type(state).__name__} of this one counts none: pass a number"
        )


def _refuse_accumulation(inner_state: PyTree) -> None:
    is_multi = lambda x: isinstance(x, optax.MultiStepsState)
    if any(map(is_multi, jax.tree.leaves(inner_state, is_leaf=is_multi))):
        raise ValueError(
            "compressed_training(MultiSteps(...)) would advance schedules at every micro-step: use "
            "optax.MultiSteps(compressed_training(...), ...) instead"
        )
