"""The law of removal: the function of smaller parameters is that of masked ones."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.tree import named_leaves


def values(tree, seed=0):
    """Normal values of a tree's shapes; those named var are positive."""
    rng = np.random.default_rng(seed)
    draw = lambda path, x: np.abs(x) + 0.5 if path.endswith("var") else x
    leaves = [
        jnp.asarray(draw(path, rng.normal(size=x.shape) * 0.5), x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for path, x in named_leaves(tree)
    ]
    return jax.tree.structure(tree).unflatten(leaves)


def masked(params, kept):
    """Zeros at all entries of floating leaves of which an index is not kept, by numpy."""
    leaves = []
    for path, x in named_leaves(params):
        x = np.array(x)
        for axis, indices in kept.get(path, {}).items():
            gone = np.setdiff1d(np.arange(x.shape[axis]), indices)
            if x.dtype.kind == "f":
                np.moveaxis(x, axis, 0)[gone] = 0
        leaves.append(jnp.asarray(x))
    return jax.tree.structure(params).unflatten(leaves)


def shrunk(params, kept):
    """The entries of which all indices are kept, by numpy."""
    leaves = []
    for path, x in named_leaves(params):
        x = np.asarray(x)
        for axis, indices in kept.get(path, {}).items():
            x = np.take(x, indices, axis)
        leaves.append(jnp.asarray(x))
    return jax.tree.structure(params).unflatten(leaves)


def loss(fn):
    """A scalar that every entry of the outputs reaches with its own weight."""

    def total(params, *args):
        leaves = [x for x in jax.tree.leaves(fn(params, *args)) if x.dtype == jnp.float32]
        return sum(jnp.vdot(jnp.cos(3.0 * jnp.arange(x.size)).reshape(x.shape), x) for x in leaves)

    return total


def check(fn, params, args, plan, *, grad=True, rtol=2e-5):
    """Forward and gradient of the rewritten function against numpy's masks and cuts."""
    kept, rewrite = plan.kept, plan.rewrite(params)
    small, g = shrunk(params, kept), rewrite.function(fn)
    jax.tree.map(np.testing.assert_array_equal, rewrite.params, small)
    zeros = masked(params, kept)
    jax.tree.map(np.testing.assert_array_equal, rewrite.undo(small), zeros)
    both = (lambda f: jax.value_and_grad(f, allow_int=True)) if grad else (lambda f: f)
    run = lambda f: jax.jit(lambda p: (f(p, *args), both(loss(f))(p, *args)))
    out, back = run(fn)(zeros)
    small_out, small_back = run(g)(small)
    close(small_out, out, rtol)
    if grad:
        close(small_back[1], shrunk(back[1], kept), rtol)


def close(got, wanted, rtol):
    """Sums of float32 in another order differ by some units of the last place of the largest."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
    pairs = [(x, y) for x, y in pairs if y.dtype != jax.dtypes.float0]
    size = max(float(np.abs(y).max(initial=0.0)) for _, y in pairs)
    for x, y in pairs:
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * size)


def lengths(jaxpr):
    """The lengths of all axes of all values, those inside of called functions too."""
    found = set()
    for eqn in jaxpr.eqns:
        for v in (*eqn.invars, *eqn.outvars):
            found.update(getattr(v.aval, "shape", ()))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found |= lengths(getattr(inner, "jaxpr", inner))
    return found


def every_third(groups, exact=True):
    """A plan that takes every third unit of each group."""
    units = {
        name: range(0, len(group) - 1, 3)
        for name, group in groups.items()
        if not (exact and group.inexact)
    }
    return groups.plan(units, allow_inexact=not exact)
