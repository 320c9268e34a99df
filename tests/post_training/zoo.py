"""Models of the zoo with inputs to calibrate on, whose parts are of sizes of their own."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter1d

import jaxopt_compress as jc
from jaxopt_compress.tree import map_named
from tests.models import CASES

ZOO = {case.name: case for case in CASES}
# A convolution has up to 48 inputs, and a batch hardly more rows: fewer would be fitted by heart.
BATCHES = 32


class Model(NamedTuple):
    """A function, what it was calibrated on, and what it was not."""

    name: str
    fn: Callable[..., Any]
    params: Any
    seen: list[tuple[Any, ...]]
    unseen: list[tuple[Any, ...]]
    given: dict[str, Any]
    held_out: Any

    @property
    def paths(self):
        """The parameters that are summed over."""
        uses = self.given["uses"]
        return [p for p in self.held_out if any(u.contracting for u in uses.get(p, ()))]


@functools.cache
def model(name):
    """A model of the zoo whose layers, experts and channels are of sizes of their own."""
    fn, params, args = ZOO[name].make()
    uses = jc.uses(fn, params, *args)
    params = map_named(lambda path, w: sized(w, uses.get(path, ())), params)
    seen, unseen = ([inputs(args, BATCHES * i + j) for j in range(BATCHES)] for i in range(2))
    stats, held_out = (calibrated(fn, params, batches) for batches in (seen, unseen))
    return Model(name, fn, params, seen, unseen, {"uses": uses, "stats": stats}, held_out)


def calibrated(fn, params, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jc.calibrate(fn, params, batches)


def sized(w, uses):
    """A weight with other magnitudes in each entry of its stack axes."""
    for axis in {a for use in uses for a in (*use.stack, *use.batch)} if len(uses) else ():
        sizes = np.resize([1.0, 3.0, 0.3, 2.0], w.shape[axis]).astype(np.float32)
        w = w * sizes.reshape([-1 if d - w.ndim == axis else 1 for d in range(w.ndim)])
    return w


def inputs(args, seed):
    """Arguments of the same kind; columns of floats are correlated, and of different sizes.

    So are neighbours along middle axes: without them nothing that a depthwise convolution sums
    over is correlated, and no solver can gain.
    """
    rng = np.random.default_rng(seed)

    def like(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.permutation(np.ravel(x)).reshape(x.shape))
        k = x.shape[-1]
        same = np.random.default_rng(k)
        mix = same.normal(size=(k // 2, k)) * np.geomspace(0.3, 3, k)
        z = rng.normal(size=(*x.shape[:-1], k // 2)) @ mix / k**0.5
        z = z + 0.1 * rng.normal(size=x.shape)
        for axis in range(1, x.ndim - 1):
            z = gaussian_filter1d(z, 1.0, axis)
        return jnp.asarray(z, x.dtype)

    return jax.tree.map(like, args)
