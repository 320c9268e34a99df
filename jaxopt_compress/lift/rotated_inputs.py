"""Products with weights that were rotated along what they sum over: the activation is rotated."""

import jax

from jaxopt_compress.arrays import RotatedArray, is_compressed
from jaxopt_compress.lift.interpreter import Call, leaf_rule, replay_equation
from jaxopt_compress.lift.products import Product, aligned, axis_names, contract
from jaxopt_compress.numerics.hadamard import rotated
from jaxopt_compress.typing import Value


@contract.register
def _contract_rotated(w: RotatedArray, x: jax.Array, how: Product) -> Value:
    met = (*how.contract[1], *how.batch[1])
    axes = [d % w.ndim for d in w.axes]
    own = dict(zip(how.contract[1], how.contract[0], strict=True))
    if not all(d in own for d in axes):
        return NotImplemented
    if any(n > 1 and d not in met for d, n in enumerate(w.signs.shape)):
        return NotImplemented
    of_x, of_w, _ = axis_names(x.ndim, w.ndim, how)
    signs = aligned(w.signs, of_w, of_x)
    x = rotated(x, signs, [own[d] for d in axes])
    return contract(w.array, x, how._replace(place=None))


@leaf_rule("conv_general_dilated", RotatedArray)
def _conv(call: Call, at: int) -> Value:
    """A rotation of all input channels is the same at each place of the window."""
    w, numbers = call.operands[at].array, call.params["dimension_numbers"]
    if at != 1 or call.params["feature_group_count"] != 1 or call.params["batch_group_count"] != 1:
        return NotImplemented
    if [d % w.ndim for d in w.axes] != [numbers.rhs_spec[1]]:
        return NotImplemented
    x = call.others(at)[0]
    shape = [1] * x.ndim
    shape[numbers.lhs_spec[1]] = -1
    x = rotated(x, w.signs.reshape(shape), [numbers.lhs_spec[1]])
    kernel = call.operands[1].replace(w.array) if is_compressed(w.array) else w.array
    [y] = replay_equation(call._replace(operands=[x, kernel]))
    return y
