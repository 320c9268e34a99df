"""PACT: activations that are clipped at a learned value."""

from jaxopt_compress.compression import Compression
from jaxopt_compress.quantization.checks import check_gradients
from jaxopt_compress.quantization.inputs import with_inputs


def pact(
    weights: Compression,
    inputs: str = "uint4",
    alpha: float | None = None,
    *,
    gradients: str | None = None,
) -> Compression:
    r"""Rounds activations between 0 and a learned clipping value, beside quantized parameters.

    .. math:: \hat x = \mathrm{round}(\mathrm{clip}(x, 0, \alpha) / s) \, s, \quad
        s = \alpha / q_{max}, \qquad
        \frac{\partial \hat x}{\partial \alpha} = [x \ge \alpha]

    One :math:`\alpha` for all that meets a parameter; for each entry of a stack of its own. It is a
    learned part: the optimizer ``compressed_training(..., learned=)`` trains it, and its weight
    decay is the paper's regularization. Each update of the compression brings it back to within a
    factor of 1024 of where it started, and replaces NaN by the start. A signed format clips at the
    same number of steps, down to the lowest level.

    Args:
        weights: How the parameters themselves are quantized: `quantize`, `lsq` or `dorefa`, without
            ``inputs``.
        inputs: The integer format of the activations, of at most 8 bits; `lift` rounds them.
        alpha: Where it starts; by default at the largest value that ``stats`` have seen.
        gradients: As in `quantize`.

    Returns:
        A `Compression` that stores `InputQuantizedArray`.

    Raises:
        ValueError: An ``alpha`` that is not positive, a format that is not of integers; in
            ``init``: other ``weights``, or no ``stats`` and no ``alpha``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.pact(jc.quantize("int4"), "uint4", alpha=7.5)
        >>> small = jc.compress({"w": jnp.ones((2, 1))}, c)
        >>> y = jc.lift(lambda p, x: x @ p["w"])(small, jnp.array([[9.0, -1.0]]))
        >>> print(f"{y.item():.3f}")
        7.000

    References:
        Choi et al., 2018, PACT: Parameterized Clipping Activation for Quantized Neural Networks.
    """
    if alpha is not None and not 2.0**-100 <= alpha <= 2.0**100:
        raise ValueError(f"alpha={alpha}; it is a positive number")
    check_gradients(gradients, inputs)
    return with_inputs(weights, inputs, "pact", gradients, alpha)
