"""Losses between intermediate activations, such as those that `jaxopt_compress.capture` returns.

>>> import jax, jax.numpy as jnp, jaxopt_compress as jc
>>> model = lambda params, x: jnp.maximum(x @ params["in"], 0) @ params["out"]
>>> params = {"in": jnp.ones((8, 4)), "out": jnp.ones((4, 2))}
>>> output, seen = jc.capture(model, at="in")(params, jnp.ones((3, 8)))
>>> seen["in"][0].shape
(3, 4)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "attention_transfer",
    "contrastive",
    "projected",
    "projection",
    "relational_angles",
    "relational_distances",
]


def projection(key: jax.Array, student_width: int, teacher_width: int) -> jax.Array:
    """A random projection for `projected`, to be trained with the student.

    Args:
        key: A random key.
        student_width: Features of the student.
        teacher_width: Features of the teacher.

    Returns:
        Float32 ``[student_width, teacher_width]`` of variance ``1 / student_width``.
    """
    return jax.random.normal(key, (student_width, teacher_width)) / math.sqrt(student_width)


def projected(
    student: jax.Array, teacher: jax.Array, projection: jax.Array | None = None
) -> jax.Array:
    r"""The squared distance of projected features, relative to the teacher's size.

    .. math:: \frac{\| s P - t \|^2}{\mathrm{mean} \| t \|^2}

    so that layers of different scale weigh the same.

    Args:
        student: ``[*positions, features]``, floating.
        teacher: ``[*positions, features of the teacher]``; a constant.
        projection: ``[features, features of the teacher]``, from `projection`; may be left out
            where both have the same features.

    Returns:
        Float32 ``[*positions]``.

    Raises:
        ValueError: Shapes do not fit each other.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> student, teacher = jnp.ones((4, 8)), jnp.ones((4, 16))
        >>> projected(student, teacher, projection(jax.random.key(0), 8, 16)).shape
        (4,)

    References:
        Romero et al., 2015, FitNets: Hints for Thin Deep Nets.
    """
    s = student.astype(jnp.float32)
    if projection is not None:
        if projection.shape != (student.shape[-1], teacher.shape[-1]):
            raise ValueError(
                f"projection of shape {projection.shape} does not map {student.shape[-1]} features "
                f"to {teacher.shape[-1]}"
            )
        s = s @ projection.astype(jnp.float32)
    if s.shape != teacher.shape:
        hint = "; give a projection" if projection is None else ""
        raise ValueError(f"features of shape {s.shape} and {teacher.shape} differ{hint}")
    t = lax.stop_gradient(teacher.astype(jnp.float32))
    size = jnp.mean(jnp.sum(jnp.square(t), -1))
    return jnp.sum(jnp.square(s - t), -1) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)


def attention_transfer(student: jax.Array, teacher: jax.Array) -> jax.Array:
    r"""The distance of maps that say where activations are large.

    .. math:: \left\| \frac{q_s}{\|q_s\|} - \frac{q_t}{\|q_t\|} \right\|^2, \quad
        q = \sum_c x_c^2

    Args:
        student: ``[n, *positions, channels]``, such as pixels, or tokens.
        teacher: Likewise with the same positions, and any channels; a constant.

    Returns:
        Float32 ``[n]``, from 0 to 2.

    Raises:
        ValueError: Positions differ.

    Example:
        >>> import jax.numpy as jnp
        >>> attention_transfer(jnp.ones((2, 7, 7, 16)), 3 * jnp.ones((2, 7, 7, 64))).round(6)
        Array([0., 0.], dtype=float32)

    References:
        Zagoruyko and Komodakis, 2017, Paying More Attention to Attention.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"activations of shape {student.shape} and {teacher.shape} have other positions; "
            "resize one, as by jax.image.resize"
        )
    s, t = (_unit(jnp.sum(jnp.square(_rows(x)), -1)) for x in (student, teacher))
    return jnp.sum(jnp.square(s - lax.stop_gradient(t)), -1)


def relational_distances(student: jax.Array, teacher: jax.Array) -> jax.Array:
    r"""How the distances between the examples of a batch differ.

    .. math:: \mathrm{mean}_{i \ne j} \, \mathrm{huber}\left(
        \frac{d^s_{ij}}{\bar d^s} - \frac{d^t_{ij}}{\bar d^t} \right)

    Args:
        student: Features, ``[n, features]``, of at least two examples.
        teacher: ``[n, features of the teacher]``; a constant.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: Numbers of examples differ, or features are not matrices.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> float(relational_distances(3 * x, x).round(6))
        0.0

    References:
        Park et al., 2019, Relational Knowledge Distillation.
    """
    _check_examples(student, teacher, 2)
    s, t = (_relative_distances(x.astype(jnp.float32)) for x in (student, teacher))
    n = len(student)
    return jnp.sum(_huber(s - lax.stop_gradient(t))) / (n * (n - 1))


def relational_angles(student: jax.Array, teacher: jax.Array) -> jax.Array:
    r"""How the angles between the examples of a batch differ.

    .. math:: \mathrm{mean}_{i \ne j \ne k} \, \mathrm{huber}(\cos^s_{ijk} - \cos^t_{ijk})

    with the angle at :math:`j` between :math:`i` and :math:`k`. Takes memory for ``n^3`` numbers.

    Args:
        student: Features, ``[n, features]``, of at least three examples.
        teacher: ``[n, features of the teacher]``; a constant.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: As for `relational_distances`.

    References:
        Park et al., 2019, Relational Knowledge Distillation.
    """
    _check_examples(student, teacher, 3)
    s, t = (_cosines(x.astype(jnp.float32)) for x in (student, teacher))
    n = len(student)
    i, j, k = jnp.ogrid[:n, :n, :n]
    apart = (i != j) & (j != k) & (i != k)
    terms = jnp.where(apart, _huber(s - lax.stop_gradient(t)), 0)
    return jnp.sum(terms) / (n * (n - 1) * (n - 2))


def contrastive(student: jax.Array, teacher: jax.Array, temperature: float = 0.1) -> jax.Array:
    r"""Each example's features are to be nearest to the teacher's for the same example.

    .. math:: -\log \frac{\exp(\cos(s_i, t_i) / \tau)}{\sum_j \exp(\cos(s_i, t_j) / \tau)}

    Args:
        student: Features, ``[n, features]``.
        teacher: An array of the same shape; a constant. Project the student's where widths differ.
        temperature: Tau, more than 0.

    Returns:
        Float32 ``[n]``.

    Raises:
        ValueError: Shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> contrastive(jnp.eye(3), jnp.eye(3)).round(4)
        Array([0.0001, 0.0001, 0.0001], dtype=float32)

    References:
        Tian et al., 2020, Contrastive Representation Distillation. The loss is that of Oord et al.,
        2018, Representation Learning with Contrastive Predictive Coding.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"contrastive takes [n, features] of both, and got {student.shape} and {teacher.shape}"
        )
    s, t = _unit(student.astype(jnp.float32)), _unit(teacher.astype(jnp.float32))
    scores = s @ lax.stop_gradient(t).T / temperature
    return jax.nn.logsumexp(scores, -1) - jnp.diagonal(scores)


def _rows(x: jax.Array) -> jax.Array:
    """``[n, positions, channels]`` in float32."""
    return x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])


def _unit(x: jax.Array) -> jax.Array:
    """Rows of length 1; zeros stay zeros, with derivatives of zero."""
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    safe = jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, x * lax.rsqrt(safe), 0)


def _relative_distances(x: jax.Array) -> jax.Array:
    """Distances between rows over their mean; derivatives of zero where rows are equal."""
    square = jnp.sum(jnp.square(x[:, None] - x[None]), -1)
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    mean = jnp.sum(distance) / (len(x) * (len(x) - 1))
    return distance / jnp.where(mean > 0, mean, 1)


def _cosines(x: jax.Array) -> jax.Array:
    """``[i, j, k]``: the cosine of the angle at ``j``."""
    away = _unit(x[:, None] - x[None])  # from j to i
    return jnp.einsum("ijd,kjd->ijk", away, away)


def _huber(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size <= 1, 0.5 * jnp.square(x), size - 0.5)


def _check_examples(student: jax.Array, teacher: jax.Array, least: int) -> None:
    matrices = student.ndim == teacher.ndim == 2 and len(student) == len(teacher)
    if not matrices or len(student) < least:
        raise ValueError(
            f"relations take [n, features] of the same {least} examples or more, and got "
            f"{student.shape} and {teacher.shape}"
        )
