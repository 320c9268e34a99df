"""Functions of several layers, and recipes for them, that are compressed in order."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress.compression import Decision, LeafMethod, LeafState, NeedsStats, compression_of


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


D = 8
BATCHES = [normal(100 + i, 6, D) for i in range(3)]
SCALES = jnp.array([1.0, 0.1, 10.0, 3.0])


def layers(params, x):
    """Unrolled, from a list."""
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return x @ params["out"]


def indexed(params, x):
    """Unrolled, from a stack."""
    for i in range(len(SCALES)):
        x = jnp.tanh(x @ params["w"][i])
    return x @ params["out"]


def scanned(params, x):
    """Scanned and rematerialized, in another dtype, reversed."""

    @jax.checkpoint
    def body(x, w):
        return jnp.tanh(x @ w.astype(x.dtype)), jnp.sum(x)

    x, sums = jax.lax.scan(body, x, params["w"], reverse=True)
    return x @ params["out"] + sums.sum()


def experts(params, x):
    """Each expert on inputs of its own."""
    x = jnp.stack([x, 10 * x, 0.1 * x, -x])
    return jnp.tanh(jnp.einsum("end,edf->enf", x, params["w"])).sum(0) @ params["out"]


def transposed(params, x):
    """[out, in] weights inside of jit, beside a table that is tied to the last product."""
    hidden = jax.jit(lambda w, x: jnp.tanh(x @ w.T))(params["w"][0], x)
    return (hidden + params["out"][:, jnp.arange(6)].T) @ params["out"]


def chosen(params, x):
    """Each row by an expert of its choice, by all forms of a lookup."""
    ids = jnp.argmax(x[:, :4], -1)
    x = jnp.einsum("bd,bdf->bf", x, params["w"][ids].transpose(0, 2, 1).mT)
    x = jax.vmap(lambda x, i: jnp.tanh(x @ params["v"][i]))(x, ids)
    return x @ params["u"][ids[0]] @ params["out"]


STACK = normal(0, 4, D, D) * SCALES[:, None, None]
CASES = {
    "layers": (layers, {"w": list(STACK), "out": normal(1, D, D)}),
    "indexed": (indexed, {"w": STACK, "out": normal(1, D, D)}),
    "scanned": (scanned, {"w": STACK, "out": normal(1, D, D)}),
    "experts": (experts, {"w": STACK, "out": normal(1, D, D)}),
    "chosen": (
        chosen,
        {"w": STACK, "v": STACK + 0.5, "u": STACK.mT - 0.5, "out": normal(1, D, D)},
    ),
    "transposed": (transposed, {"w": list(STACK), "out": normal(1, D, D)}),
}
GROUPS = jc.quantize("int3", group_size=4)
RECIPES = {
    "int3": GROUPS,
    "pruned": {
        "out": jc.quantize("int8"),
        "**": jc.chain(
            jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.quantize("int4")
        ),
    },
}


def in_order(name, recipe, **given):
    fn, params = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return jc.compress_in_order(fn, params, recipe, BATCHES, progress=False, **given)


def recording(seen: dict, where=None) -> jc.Compression:
    """Rounds to integers, and keeps the statistics that it got."""

    def init(parameter):
        if not isinstance(parameter.value, jax.core.Tracer):
            seen.setdefault(parameter.path, []).append(parameter.stats)
        return Decision(Rounded(parameter.value.ndim))

    def check(parameter):
        if parameter.stats is None:
            raise NeedsStats(f"no statistics for {parameter.path}")

    return compression_of(LeafMethod(check, init), where)


@jax.tree_util.register_static
class Rounded(LeafState):
    kind = "rounded"

    def __init__(self, ndim):
        self.ndim = ndim

    def __hash__(self):
        return self.ndim

    def __eq__(self, other):
        return type(self) is type(other) and self.ndim == other.ndim

    def apply(self, w, learned):
        return jnp.round(w)

    def compress(self, w, learned, path):
        return jnp.round(w)
