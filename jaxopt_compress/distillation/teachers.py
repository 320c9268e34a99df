"""Outputs of a teacher that are computed once and kept: all of them, or the largest ones."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_compress.distillation.outputs import check_temperature, divergence
from jaxopt_compress.typing import PyTree

__all__ = ["TopK", "keep_top_k", "remember", "top_k"]


class TopK(NamedTuple):
    """The likeliest classes of a teacher.

    Attributes:
        classes: int32 ``[*examples, k]``, the likeliest first.
        log_probabilities: Float32 of the same shape, at the temperature at which they were kept.
    """

    classes: Any
    log_probabilities: Any


def keep_top_k(logits: jax.Array, k: int, temperature: float = 1.0) -> TopK:
    """Keeps a teacher's ``k`` likeliest classes: 8 bytes each, in the place of all logits.

    Args:
        logits: ``[*examples, classes]``, floating.
        k: How many, from 1 to the number of classes.
        temperature: That of the loss that will be used.

    Returns:
        What `top_k` takes.

    Raises:
        ValueError: ``k`` or the temperature is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> kept = keep_top_k(jnp.array([[0.0, 3.0, 1.0]]), k=2)
        >>> kept.classes.tolist()
        [[1, 2]]
    """
    check_temperature(temperature)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k!r} of {logits.shape[-1]} classes")
    found = lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32) / temperature), k)
    return TopK(found[1].astype(jnp.int32), found[0])


def top_k(student: jax.Array, teacher: TopK, temperature: float = 1.0) -> jax.Array:
    r"""`soft_targets` from the teacher's likeliest classes, with all others as one.

    .. math:: T^2 \left( \sum_{c \in K} p_c \log \frac{p_c}{q_c}
        + p_R \log \frac{p_R}{q_R} \right)

    where :math:`R` is the rest. It is at most the divergence over all classes, and equal to it with
    all of them kept; what the rest gets is right in sum, so that the student does not become more
    certain than its teacher.

    Args:
        student: Logits, ``[*examples, classes]``, floating.
        teacher: What `keep_top_k` returned; a constant.
        temperature: T, at which it was kept.

    Returns:
        Float32 ``[*examples]``, at least 0 up to rounding.

    Raises:
        ValueError: Other examples, or a temperature that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[0.0, 3.0, 1.0, -2.0]])
        >>> float(top_k(logits, keep_top_k(logits, k=2)).round(6)[0])
        0.0
    """
    check_temperature(temperature)
    if teacher.classes.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"kept classes of shape {teacher.classes.shape} for logits of shape {student.shape}"
        )
    full = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    s = jnp.take_along_axis(full, teacher.classes, axis=-1)
    t = lax.stop_gradient(jnp.asarray(teacher.log_probabilities, jnp.float32))
    if teacher.classes.shape[-1] == student.shape[-1]:
        return temperature**2 * divergence(t, s)
    kept = jnp.put_along_axis(
        jnp.zeros(full.shape, bool), teacher.classes, True, axis=-1, inplace=False
    )
    rest = jax.nn.logsumexp(jnp.where(kept, -jnp.inf, full), -1, keepdims=True)
    t_rest = _log_rest(t)
    whole = lambda x, last: jnp.concatenate([x, last], -1)
    return temperature**2 * divergence(whole(t, t_rest), whole(s, rest))


def remember(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    keep: Callable[[Any], Any] = lambda output: output,
) -> Iterator[Any]:
    """Runs a teacher over batches, one at a time, and yields what is kept of its outputs as NumPy.

    Args:
        fn: The teacher, called as ``fn(params, *inputs)``; compiled once per shape.
        params: Its parameters.
        batches: Inputs: a tuple of arguments, or the only one.
        keep: What to keep of an output, compiled with it, such as
            ``lambda y: keep_top_k(y, 16)``.

    Yields:
        One tree of NumPy arrays per batch, in order.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda params, x: x @ params
        >>> batches = [jnp.ones((4, 3)), jnp.zeros((2, 3))]
        >>> kept = remember(fn, jnp.ones((3, 10)), batches, lambda y: keep_top_k(y, 2))
        >>> [each.classes.shape for each in kept]
        [(4, 2), (2, 2)]
    """
    run = jax.jit(lambda params, *inputs: keep(fn(params, *inputs)))
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        yield jax.tree.map(np.asarray, run(params, *inputs))


def _log_rest(kept: jax.Array) -> jax.Array:
    """``log(1 - sum(exp(kept)))``, ``[*examples, 1]``; -inf where rounding leaves nothing."""
    rest = 1 - jnp.sum(jnp.exp(kept), -1, keepdims=True)
    return jnp.where(rest > 0, jnp.log(jnp.where(rest > 0, rest, 1)), -jnp.inf)
