"""Every form of the table on every product that it takes, against one float64 oracle.

A form that joins the table joins this: `POOL` has to hold a product that it fits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.products import POOL, bound, how_of, made, taken_by
from jaxopt_compress.kernels import FORMS, Operand, explain, matmul
from jaxopt_compress.kernels.case import Case
from jaxopt_compress.kernels.matmul import PLATFORMS, run

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.kind}: {f.name}")
def test_forms_equal_the_oracle(form):
    specs = taken_by(form)
    assert specs, "no product of the pool fits"
    for spec in specs:
        x, w, own, want, sizes = made(spec)
        product = functools.partial(run, form, how=how_of(spec))
        got = jax.jit(product)(x, w, own)
        assert got.shape == want.shape and got.dtype == jnp.float32
        assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound(spec, sizes)), spec


def test_names_are_unique():
    names = [(form.kind, form.name) for form in FORMS]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("spec", POOL[::7], ids=lambda s: f"{s.format}-{s.group}-{s.x}-{s.rows}")
def test_the_form_that_is_taken_equals_the_oracle(spec):
    """Also mapped, over rows that share a weight and over weights."""
    x, w, own, want, sizes = made(spec)
    how = how_of(spec)._replace(interpret=False)
    got = jax.jit(functools.partial(matmul, how=how))(x, w, own)
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound(spec, sizes))
    chosen = explain(x, w, how=how)
    assert set(chosen) == {"", *PLATFORMS}
    for platform, form in chosen.items():
        assert not form.platforms or platform in form.platforms
        assert form.why and form.writes(Case(x, w, how)) >= 0
    if own is not None or spec.held:
        return
    product = functools.partial(matmul, how=how)
    shared = jax.vmap(product, (0, None))(jnp.stack([x, x]), w)
    assert np.all(np.abs(np.asarray(shared[1], np.float64) - want) <= bound(spec, sizes))
    apart = jax.vmap(product)(jnp.stack([x, x]), jax.tree.map(lambda a: jnp.stack([a, a]), w))
    assert np.all(np.abs(np.asarray(apart[1], np.float64) - want) <= bound(spec, sizes))


def test_wrong_shapes_are_refused():
    w = Operand(jnp.ones((64, 24), jnp.int8), jnp.ones((4, 24)), format="int8", group=16)
    x = jnp.ones((2, 64))
    alter = functools.partial(dataclasses.replace, w)
    for given, message in [
        ((x[:, :8], w), "does not meet"),
        ((x, alter(group=8)), "group = 8"),
        ((x, alter(scale=jnp.ones((4, 3)))), "does not fit a weight"),
        ((x, alter(zero=jnp.ones((1, 24), jnp.int8))), "zero of shape"),
        ((x, alter(codes=jnp.ones((8, 24), jnp.uint8), format="int1", block=12)), "multiple of 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            matmul(*given)
