"""The laws of `tests.compression.laws` for every method and every allowed chain."""

import functools

import jax
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.compression import laws
from tests.compression.laws import DTYPES, KINDS
from tests.method_contract import CHAINS, METHODS, Method, chained, prune, quantize

pytestmark = pytest.mark.filterwarnings("ignore::jaxopt_compress.AssumedLayout")

EVERY = METHODS + CHAINS


def params(methods):
    """Methods as arguments; those that are like another one in the contract run on demand."""
    alike = ("int4", "int2", "int8-", "3:5", "rank-1", "nested")
    alike += ("output", "block", "channels", "straight", "threshold", "set", "snfs", "soft")
    alike += ("hard", "variational", "rate", "share")
    kept = lambda m: [pytest.mark.slow] if m.name.startswith(alike) else []
    return [pytest.param(m, id=m.name, marks=kept(m)) for m in methods]


each = pytest.mark.parametrize("method", params(EVERY))


@functools.cache
def compiled(method):
    return laws.programs(method, laws.tree(method, 0, "normal"))


@functools.cache
def small(method):
    """Few leaves are enough for laws about how a compression runs."""
    params = laws.tree(method, 7, "normal", ["even", "empty"])
    return laws.made(method, params), params


@pytest.mark.fast("int2-grouped-asymmetric", "energy", "2:4+int4", "rank+int4", "recipe")
@each
def test_stored_form_is_the_view_bit_for_bit(method):
    run = compiled(method)
    # Ranks chosen by values are shapes, and compile anew.
    kinds = KINDS[:1] if method.needs_values else KINDS
    for seed, kind in enumerate(kinds):
        params = laws.tree(method, 100 * seed, kind)
        state = laws.check_init(run, params)
        laws.check_contract(run, params, state)
        if not laws.kinds(state) & laws.FACTORS:
            laws.check_zeros(run, params, state)


INT4 = Method("int4-asymmetric", quantize("int4", symmetric=False))
PRUNED = Method("prune+int8", chained(prune(0.5), quantize("int8")))


@pytest.mark.fast(
    "int4-asymmetric-(1,)-0-normal",
    "int4-asymmetric-(9, 1)-2-wide",
    "int4-asymmetric-(3, 2, 5, 4)-1-subnormal",
    "prune+int8-(5, 3, 2)-1-wide",
)
@pytest.mark.parametrize(
    ("method", "shape", "dtype", "kind"),
    [
        (INT4, (1,), 0, "normal"),
        (INT4, (7,), 1, "positive"),
        (INT4, (9, 1), 2, "wide"),
        (INT4, (5, 3, 2), 0, "ties"),
        (INT4, (3, 2, 5, 4), 1, "subnormal"),
        (PRUNED, (7,), 2, "ties"),
        (PRUNED, (5, 3, 2), 1, "wide"),
        (PRUNED, (3, 2, 5, 4), 0, "subnormal"),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_any_rank(method, shape, dtype, kind):
    """Each shape compiles anew: whole programs take less time than operations one by one."""
    params = {"w": laws.values(0, kind, shape, DTYPES[dtype])}
    c = laws.made(method, params)
    state = jax.jit(c.init)(params)
    compress = c.compress if method is PRUNED else jax.jit(c.compress)
    small = jax.jit(jc.materialize)(compress(params, state))
    laws.assert_same_bits(small, jax.jit(c.apply)(params, state))


@pytest.mark.fast("int8", "2:4", "rank", "prune+int8", "recipe")
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@each
def test_steps_compile_once_and_keep_types(method):
    laws.check_steps(*small(method))


@each
def test_gradients(method):
    c, params = small(method)
    laws.check_gradient(c, params, c.init(params), method.scaled)


@pytest.mark.parametrize("method", params(m for m in EVERY if not m.needs_values))
def test_vmap(method):
    c, params = small(method)
    laws.check_vmap(c, [params, laws.tree(method, 50, "normal", ["even", "empty"])])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("method", [METHODS[0], METHODS[7], METHODS[10]], ids=lambda m: m.name)
def test_values_that_are_not_finite_are_refused(method, bad):
    c, params = small(method)
    state = c.init(params)
    broken = {**params, "even": params["even"].at[2, 3].set(bad)}
    message = r"'even' of shape \(8, 6\) holds 1 entries that are infinite, NaN"
    with pytest.raises(ValueError, match=message):
        c.init(broken)
    with pytest.raises(ValueError, match=message):
        c.compress(broken, state)
