"""Operations on sums of arrays: each part takes part in its own form, and results are added."""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.typing import DTypeLike

from jaxopt_compress.arrays import SumArray, is_compressed
from jaxopt_compress.lift.interpreter import Call, leaf_rule, replay_equation
from jaxopt_compress.lift.products import Product, contract
from jaxopt_compress.numerics.rounding import promoted
from jaxopt_compress.typing import Value


@contract.register
def _contract_sum(w: SumArray, x: jax.Array, how: Product) -> Value:
    wide = how._replace(dtype=promoted(how.dtype, jnp.float32))
    products = [contract(part, x, wide) for part in w.parts]
    if any(y is NotImplemented for y in products):
        return NotImplemented
    return functools.reduce(jnp.add, products).astype(how.dtype)


@leaf_rule("conv_general_dilated ragged_dot_general ragged_dot", SumArray)
def _product(call: Call, at: int) -> Value:
    return _by_parts(call, at) if at == 1 else NotImplemented


@leaf_rule("gather", SumArray)
def _gather(call: Call, at: int) -> Value:
    """A lookup in each part; what stands for those out of bounds has to be the sum of itself."""
    filled = call.params["fill_value"]
    kept = filled is None or filled == 0 or filled != filled  # NaN
    return _by_parts(call, at) if at == 0 and kept else NotImplemented


def _by_parts(call: Call, at: int) -> jax.Array:
    ref, results = call.operands[at], []
    narrow, wide = call.out.dtype, promoted(call.out.dtype, jnp.float32)
    call = call._replace(eqn=_summed_in(wide, call.eqn))
    for part in ref.array.parts:
        operand = ref.alone().replace(part) if is_compressed(part) else part
        operands = [operand if i == at else x for i, x in enumerate(call.operands)]
        results += replay_equation(call._replace(operands=operands))
    return functools.reduce(jnp.add, [y.astype(wide) for y in results]).astype(narrow)


def _summed_in(dtype: DTypeLike, eqn: JaxprEqn) -> JaxprEqn:
    """The equation with a result of another dtype, where it can say in which it sums."""
    name = "preferred_element_type"
    if name not in eqn.params or eqn.params[name] == dtype:
        return eqn
    bind = functools.partial(eqn.primitive.bind, **{**eqn.params, name: jnp.dtype(dtype)})
    return jax.make_jaxpr(bind)(*(x.aval for x in eqn.invars)).eqns[0]
