"""Losses between the logits of a student and those of a teacher.

All take logits ``[*examples, classes]`` and return one float32 value per example, ``[*examples]``,
as the losses of optax do.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["decoupled", "jensen_shannon", "reverse_kl", "soft_targets"]


def soft_targets(student: jax.Array, teacher: jax.Array, temperature: float = 4.0) -> jax.Array:
    r"""Distillation by softened probabilities.

    .. math:: T^2 \, \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    The factor keeps gradients of one size when the temperature changes.

    Args:
        student: Logits, ``[*examples, classes]``, floating.
        teacher: Logits of the same shape; a constant.
        temperature: T, more than 0.

    Returns:
        Float32 ``[*examples]``, at least 0.

    Raises:
        ValueError: Shapes differ, or the temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[2.0, 0.0, -2.0]])
        >>> undecided = soft_targets(jnp.zeros((1, 3)), teacher, temperature=1.0)
        >>> soft_targets(teacher, teacher).tolist(), round(float(undecided[0]), 2)
        ([0.0], 0.66)

    References:
        Hinton et al., 2015, Distilling the Knowledge in a Neural Network.
    """
    s, t = log_probabilities(student, teacher, temperature)
    return temperature**2 * divergence(t, s)


def reverse_kl(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    r"""Divergence that the student's own probabilities weigh.

    .. math:: T^2 \, \mathrm{KL}(\mathrm{softmax}(s / T) \,\|\, \mathrm{softmax}(t / T))

    A student that is too small to follow every answer of the teacher then covers the likely ones,
    and puts no mass where the teacher has none. Usual for language models.

    Args:
        student: Logits, ``[*examples, classes]``, floating.
        teacher: Logits of the same shape; a constant.
        temperature: T, more than 0.

    Returns:
        Float32 ``[*examples]``, at least 0.

    Raises:
        ValueError: As for `soft_targets`.

    References:
        Gu et al., 2024, MiniLLM: Knowledge Distillation of Large Language Models.
    """
    s, t = log_probabilities(student, teacher, temperature)
    return temperature**2 * divergence(s, t)


def jensen_shannon(
    student: jax.Array, teacher: jax.Array, weight: float = 0.5, temperature: float = 1.0
) -> jax.Array:
    r"""Generalized Jensen-Shannon divergence.

    .. math:: T^2 \left( w \, \mathrm{KL}(p_t \| m) + (1 - w) \, \mathrm{KL}(p_s \| m) \right),
        \quad m = w p_t + (1 - w) p_s

    Bounded, between `soft_targets` (for small :math:`w`, divided by it) and `reverse_kl`.

    Args:
        student: Logits, ``[*examples, classes]``, floating.
        teacher: Logits of the same shape; a constant.
        weight: w, between 0 and 1, both excluded.
        temperature: T, more than 0.

    Returns:
        Float32 ``[*examples]``, from 0 to ``T^2 log 2``.

    Raises:
        ValueError: As for `soft_targets`, or a weight that is out of range.

    References:
        Agarwal et al., 2024, On-Policy Distillation of Language Models.
    """
    if not 0 < weight < 1:
        raise ValueError(f"weight={weight!r}; it lies between 0 and 1")
    s, t = log_probabilities(student, teacher, temperature)
    # The derivative of logaddexp is NaN where both have no probability.
    gone = (s == -jnp.inf) & (t == -jnp.inf)
    shares = [jnp.where(gone, 0, x) for x in (jnp.log(weight) + t, jnp.log1p(-weight) + s)]
    middle = jnp.where(gone, -jnp.inf, jnp.logaddexp(*shares))
    both = weight * divergence(t, middle) + (1 - weight) * divergence(s, middle)
    return temperature**2 * both


def decoupled(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
    temperature: float = 4.0,
) -> jax.Array:
    r"""Decoupled knowledge distillation: the target class and the others weighed apart.

    .. math:: T^2 \left( \alpha \, \mathrm{KL}(b_t \| b_s)
        + \beta \, \mathrm{KL}(\hat p_t \| \hat p_s) \right)

    where :math:`b` are the probabilities of the target class and of all others together, and
    :math:`\hat p` those among the others. In `soft_targets` a confident teacher makes the second
    term small: its weight there is the teacher's probability of all others.

    Args:
        student: Logits, ``[*examples, classes]``, floating.
        teacher: Logits of the same shape; a constant.
        labels: Integer target classes, ``[*examples]``.
        target_weight: Alpha.
        other_weight: Beta.
        temperature: T, more than 0.

    Returns:
        Float32 ``[*examples]``, at least 0.

    Raises:
        ValueError: As for `soft_targets`, or labels of another shape.

    References:
        Zhao et al., 2022, Decoupled Knowledge Distillation.
    """
    if labels.shape != student.shape[:-1]:
        raise ValueError(f"labels of shape {labels.shape} for logits of shape {student.shape}")
    s, t = log_probabilities(student, teacher, temperature)
    is_target = jax.nn.one_hot(labels, s.shape[-1], dtype=bool)
    pairs = [_target_and_others(x, is_target) for x in (t, s)]
    (t_pair, t_others), (s_pair, s_others) = pairs
    target = divergence(t_pair, s_pair)
    return temperature**2 * (target_weight * target + other_weight * divergence(t_others, s_others))


def log_probabilities(
    student: jax.Array, teacher: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Float32 log-probabilities of both, at a temperature; the teacher's are constant."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {student.shape}, the teacher's {teacher.shape}"
        )
    check_temperature(temperature)
    soften = lambda x: jax.nn.log_softmax(x.astype(jnp.float32) / temperature)
    return soften(student), lax.stop_gradient(soften(teacher))


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that is not positive."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature!r}; it is more than 0")


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL of log-probabilities along the last axis; what has no probability in ``p`` counts 0."""
    p_or_zero = jnp.where(p == -jnp.inf, 0, p)
    q_or_zero = jnp.where(p == -jnp.inf, 0, q)
    return jnp.sum(jnp.exp(p) * (p_or_zero - q_or_zero), -1)


def _target_and_others(x: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of target and rest, ``[*examples, 2]``, and those within the rest."""
    target = jnp.sum(jnp.where(is_target, x, 0), -1)
    others = jnp.where(is_target, -jnp.inf, x)
    rest = jax.nn.logsumexp(others, -1)
    # Without others none has a probability among them.
    some = jnp.where(rest == -jnp.inf, 0, rest)[..., None]
    return jnp.stack([target, rest], -1), others - some
