"""Examples of arrays around others: with inputs, with factors, sums and rotations."""

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxopt_compress.arrays import InputQuantizedArray, RotatedArray, ScaledArray, SumArray
from tests.arrays.example import Example, float_fields


def with_inputs(build):
    """A weight that rounds what it meets; steps of that are no part of the array."""

    def wrapped(rng, stack):
        leaf, formula = build(rng, stack)
        whole = InputQuantizedArray(leaf, jnp.full((*stack, 1, 1), 0.5), "int8")
        return Example(whole, lambda *fields: formula(*fields[:-1]))

    return wrapped


def with_factors(build, shape):
    """An array whose inputs have factors."""

    def wrapped(rng, stack):
        leaf, formula = build(rng, stack)
        factors = jnp.asarray(rng.uniform(0.5, 2.0, (*stack, *shape)), jnp.float32)
        dense = lambda *fields: (formula(*fields[:-1]).astype(jnp.float32) * fields[-1]).astype(
            leaf.dtype
        )
        return Example(ScaledArray(leaf, factors), dense)

    return wrapped


def summed(*builds):
    """The sum of arrays in several forms."""

    def build(rng, stack):
        parts = [build(rng, stack) for build in builds]

        def formula(*fields):
            fields, total = iter(fields), 0.0
            for leaf, dense in parts:
                own = [next(fields) for _ in float_fields(leaf)]
                total = total + dense(*own).astype(jnp.float32)
            return total.astype(parts[0].leaf.dtype)

        return Example(SumArray(tuple(leaf for leaf, _ in parts)), formula)

    return build


def rotated(build, axis):
    """An array that was rotated along an axis; by transforms of scipy's, which are symmetric."""

    def wrapped(rng, stack):
        leaf, formula = build(rng, stack)
        size = leaf.shape[axis]
        shape = [size if d == axis else 1 for d in range(len(stack) - leaf.ndim, 0)]
        signs = jnp.asarray(rng.choice([-1, 1], (*stack, *shape)), jnp.int8)

        def dense(*fields):
            x = jnp.moveaxis(formula(*fields), axis, -1)
            x = x.reshape(*x.shape[:-1], size // 2, 2)
            for d, n in ((-2, size // 2), (-1, 2)):
                rows, total = scipy.linalg.hadamard(n).astype(np.float32), 0.0
                for j, row in enumerate(rows):
                    part = jnp.take(x, jnp.array([j]), axis=d)
                    total = total + part * row.reshape(-1, *(1,) * (-1 - d))
                x = total
            turned = x.reshape(*x.shape[:-2], size) * np.float32(size**-0.5)
            return (jnp.moveaxis(turned, -1, axis) * signs).astype(leaf.dtype)

        return Example(RotatedArray(leaf, signs, (axis,)), dense)

    return wrapped
