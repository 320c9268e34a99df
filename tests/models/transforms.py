"""Plain functions under vmap, custom derivatives, checkpointing and sharding."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .case import Case, dot, normal
from .plain import plain, weights


@jax.custom_vjp
def _clipped_matmul(x, w):
    """A product whose cotangents are clipped, and small enough that a lost rule shows."""
    return x @ w


def _clipped_matmul_fwd(x, w):
    return x @ w, (x, w)


def _clipped_matmul_bwd(residuals, g):
    x, w = residuals
    g = jnp.clip(g, -0.1, 0.1)
    return g @ w.T, x.T @ g


_clipped_matmul.defvjp(_clipped_matmul_fwd, _clipped_matmul_bwd)


@jax.custom_jvp
def _doubled_matmul(x, w):
    """A product whose tangent is twice its own, so that a lost rule shows."""
    return x @ w


@_doubled_matmul.defjvp
def _doubled_matmul_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2 * (dx @ w + x @ dw)


@jax.custom_jvp
def _straight_through_sign(x):
    """The sign, with the derivative of the identity."""
    return jnp.sign(x)


@_straight_through_sign.defjvp
def _straight_through_sign_jvp(primals, tangents):
    return jnp.sign(primals[0]), tangents[0]


def _vmap_examples(params, x):
    def example(x):
        return jnp.tanh(x @ params["first"]) @ params["second"].T

    return jax.vmap(example)(x)


def _mlp(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def _named_mlp(params, x):
    return checkpoint_name(jnp.tanh(x @ params["first"]), "hidden") @ params["second"]


def _named_weights(params, x):
    return _mlp(jax.tree.map(lambda w: checkpoint_name(w, "weight"), params), x)


def _checkpointed(fn, policy):
    return jax.checkpoint(fn, policy=policy)


def _meshed(name, build, uses):
    """A case on a mesh of eight devices, which exists only once the case is made."""

    def make():
        mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
        return build(mesh), weights(_SHAPES), (normal(0, 16, 24),)

    return Case(name, make, uses)


def _constrained(mesh):
    def fn(params, x):
        rows = NamedSharding(mesh, P("devices", None))
        columns = NamedSharding(mesh, P(None, "devices"))
        x = jax.lax.with_sharding_constraint(x, rows)
        h = jax.lax.with_sharding_constraint(jnp.tanh(x @ params["first"]), columns)
        return jax.lax.with_sharding_constraint(h @ params["second"], rows)

    return fn


def _data_parallel(mesh):
    return jax.shard_map(_mlp, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P("devices"))


def _tensor_parallel(mesh):
    def layer(w, x):
        return jax.shard_map(
            lambda w, x: x @ w,
            mesh=mesh,
            in_specs=(P(None, "devices"), P()),
            out_specs=P(None, "devices"),
        )(w, x)

    return lambda params, x: layer(params["second"], jnp.tanh(layer(params["first"], x)))


_SHAPES = {"first": (24, 32), "second": (32, 40)}
_USES = {name: [dot()] for name in _SHAPES}
_MODELS = {name: (3, *shape) for name, shape in _SHAPES.items()}

CASES = [
    plain(
        "vmap_examples",
        _vmap_examples,
        {"first": (16, 24), "second": (8, 24)},
        (5, 16),
        {"first": [dot()], "second": [dot((-1,), (-2,))]},
    ),
    plain(
        "vmap_models",
        jax.vmap(_mlp),
        _MODELS,
        (3, 5, 24),
        {name: [dot(batch=(-3,))] for name in _MODELS},
    ),
    # The first layer's models all see one activation, so the axis of models is one of its outputs.
    plain(
        "vmap_models_shared_input",
        jax.vmap(_mlp, in_axes=(0, None)),
        _MODELS,
        (5, 24),
        {"first": [dot((-2,), (-3, -1))], "second": [dot(batch=(-3,))]},
    ),
    plain(
        "custom_vjp_of_weight",
        lambda p, x: _clipped_matmul(jnp.tanh(_clipped_matmul(x, p["first"])), p["second"]),
        _SHAPES,
        (5, 24),
        _USES,
        expanded=("custom_vjp_call",),
    ),
    plain(
        "custom_jvp_of_weight",
        lambda p, x: _doubled_matmul(jnp.tanh(_doubled_matmul(x, p["first"])), p["second"]),
        _SHAPES,
        (5, 24),
        _USES,
    ),
    plain(
        "custom_jvp_of_activation",
        lambda p, x: _straight_through_sign(x @ p["first"]) @ p["second"],
        _SHAPES,
        (5, 24),
        _USES,
    ),
    plain(
        "checkpoint_policy",
        _checkpointed(_mlp, jax.checkpoint_policies.dots_saveable),
        _SHAPES,
        (5, 24),
        _USES,
    ),
    plain(
        "checkpoint_name",
        _checkpointed(_named_mlp, jax.checkpoint_policies.save_only_these_names("hidden")),
        _SHAPES,
        (5, 24),
        _USES,
    ),
    plain(
        "checkpoint_name_of_weight",
        _checkpointed(_named_weights, jax.checkpoint_policies.save_only_these_names("weight")),
        _SHAPES,
        (5, 24),
        _USES,
    ),
    _meshed("sharding_constraint", _constrained, _USES),
    _meshed("shard_map_data_parallel", _data_parallel, _USES),
    _meshed("shard_map_tensor_parallel", _tensor_parallel, _USES),
]
