"""Training of many seeds at once, on images of MNIST that are shifted at random.

`examples.mnist_pruning` decides what is trained here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxopt_compress as jc
from examples.models.lenet import DROPPED, WEIGHTS

BATCH, ROUNDS, RATE, TEMPERATURE = 128, 5, 3e-3, 2.0


def shifted(key, images):
    """Each image moved by up to one pixel either way."""
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    cut = lambda image, at: lax.dynamic_slice(image, tuple(at), images.shape[1:])
    return jax.vmap(cut)(padded, corners)


def make_step(apply, tx, view, teaching):
    """``step(state, data, rows, key, teacher) -> state`` of one member.

    A member's state is its parameters and its optimizer's state; ``teaching`` is the weight of the
    loss on the logits of the teacher, beside that on labels.
    """
    noisy = DROPPED.get(apply, lambda params, images, key: apply(params, images))

    def loss(params, images, labels, key, teacher):
        logits = noisy(params, images, key)
        own = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if not teaching:
            return own
        soft = jc.distillation.soft_targets(logits, apply(teacher, images), TEMPERATURE)
        return (1 - teaching) * own + teaching * soft.mean()

    def step(state, data, order, i, key, teacher):
        params, opt_state = state
        rows = lax.dynamic_slice_in_dim(order, i % (len(order) // BATCH) * BATCH, BATCH)
        own = jax.random.split(jax.random.fold_in(key, i))
        images = shifted(own[0], data[0][rows])
        seen = view(params, opt_state)
        grads = jax.grad(loss)(seen, images, data[1][rows], own[1], teacher)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def train(
    apply,
    params,
    data,
    seeds,
    steps,
    advance,
    c=None,
    uses=None,
    state=None,
    penalty=0.0,
    teacher=None,
    teaching=0.0,
    gates_rate=None,
):
    """Trains all members from ``params``; returns parameters and the optimizer's states.

    `state` is that of the compression, where masks are there already; ``advance`` is told of steps;
    ``gates_rate`` is the learning rate of learned parts, where it is not that of parameters.
    """
    cosine = optax.cosine_decay_schedule
    tx, view = optax.adam(cosine(RATE, steps)), lambda params, opt_state: params
    if c is not None:
        # The price of an entry grows, or all would go before any has learned.
        rising = optax.linear_schedule(0.0, penalty / len(data[1]), steps // 2) if penalty else 0.0
        learned = optax.adam(cosine(gates_rate, steps)) if gates_rate else None
        tx, view = jc.compressed_training(tx, c, learned, uses=uses, penalty=rising), c.view
    many = jax.vmap if len(seeds) > 1 else alone
    own_step = make_step(apply, tx, view, teaching)
    step = jax.jit(many(own_step, in_axes=(0, None, 0, None, 0, 0)), donate_argnums=0)
    now = (jax.tree.map(jnp.copy, params), jax.jit(many(tx.init))(params))
    if state is not None:
        now = (now[0], optax.tree_utils.tree_set(now[1], compression=state))
    images, orders = len(data[1]), jnp.zeros((len(seeds), 0), jnp.int32)
    own = jnp.stack([jax.random.key(seed) for seed in seeds])
    teacher = params if teacher is None else teacher
    permuted = jax.jit(jax.vmap(lambda key: jax.random.permutation(key, images)))
    folded = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(0, None)))
    for i in range(steps):
        if i % (images // BATCH) == 0:
            # As an order of whole batches, whose number says where an epoch ends.
            orders = permuted(folded(own, i))[:, : images // BATCH * BATCH]
        now = step(now, data, orders, i, own, teacher)
        if i % 20 == 0:
            jax.block_until_ready(now)  # Steps are dispatched ahead: progress would be a lie.
            advance(20)
    return now


def alone(fn, in_axes: Any = 0):
    """As `jax.vmap` for one member: convolutions by kernels of many members are slow on CPUs."""

    def run(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        first = lambda x: x[0]
        own = [jax.tree.map(first, x) if a == 0 else x for a, x in zip(axes, args, strict=True)]
        return jax.tree.map(lambda x: x[None], fn(*own))

    return run


def tickets(apply, params, data, seeds, steps, sparsity, uses, advance):
    """Iterative magnitude pruning: the weights that training has made large, from early values."""
    early, _ = train(apply, params, data, seeds, max(1, steps // 20), lambda count: None)
    trained, _ = train(apply, early, data, seeds, steps, advance)
    for i in range(1, ROUNDS + 1):
        schedule = jc.schedules.constant(1 - (1 - sparsity) ** (i / ROUNDS))
        c = jc.prune(jc.scores.magnitude(), schedule, where=WEIGHTS, scope="global")
        many = jax.vmap if len(seeds) > 1 else alone
        # What training has not kept is 0 in the parameters that it hands on.
        state = jax.jit(many(lambda p, c=c: c.init(p, uses=uses)))(trained)
        trained, opt_state = train(apply, early, data, seeds, steps, advance, c, uses, state)
        trained = jax.jit(many(c.view))(trained, opt_state)
    return c, trained, opt_state
