"""Losses that train a small model to do what a large one does.

All are plain functions of arrays. The teacher is a constant in each of them: no gradient reaches
it, so it may be the same parameters before compression, another model in the same jit, or arrays
that were computed before.

    >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
    >>> model = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> normal = jax.random.normal
    >>> params = {"in": normal(keys[0], (8, 32)) / 3, "out": normal(keys[1], (32, 5)) / 6}
    >>> x = normal(keys[2], (64, 8))
    >>> quantize = jc.quantize("int2")
    >>> state = quantize.init(params, uses=jc.uses(model, params, x))
    >>> def loss(trained, reference, x):  # the compressed view learns from the dense parameters
    ...     student, teacher = model(quantize.apply(trained, state), x), model(reference, x)
    ...     return jnp.mean(jc.distillation.soft_targets(student, teacher, temperature=2.0))
    >>> step = jax.jit(jax.grad(loss))
    >>> trained = params
    >>> for _ in range(50):
    ...     trained = jax.tree.map(lambda w, g: w - 0.05 * g, trained, step(trained, params, x))
    >>> bool(loss(trained, params, x) < 0.6 * loss(params, params, x))
    True
"""

from jaxopt_compress.distillation.features import (
    attention_transfer,
    contrastive,
    projected,
    projection,
    relational_angles,
    relational_distances,
)
from jaxopt_compress.distillation.outputs import (
    decoupled,
    jensen_shannon,
    reverse_kl,
    soft_targets,
)
from jaxopt_compress.distillation.teachers import TopK, keep_top_k, remember, top_k

__all__ = [
    "TopK",
    "attention_transfer",
    "contrastive",
    "decoupled",
    "jensen_shannon",
    "keep_top_k",
    "projected",
    "projection",
    "relational_angles",
    "relational_distances",
    "remember",
    "reverse_kl",
    "soft_targets",
    "top_k",
]
