"""Kernels of convolutions by way of fewer channels."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import MaskedArray, TuckerArray, is_compressed
from jaxopt_compress.arrays.fields import is_traced
from jaxopt_compress.compression import (
    Compression,
    Decision,
    LeafMethod,
    LeafState,
    NeedsValues,
    Parameter,
    compression_of,
    spelled,
)
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.compression.leaf_states import RANK
from jaxopt_compress.low_rank.low_rank import ELSEWHERE
from jaxopt_compress.numerics.tucker import mode_energies, tucker2
from jaxopt_compress.tree import Where
from jaxopt_compress.typing import Leaf, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["dtype", "channels", "kind"]
)
@dataclasses.dataclass(frozen=True)
class TuckerState(LeafState):
    """How three learned parts make up the kernel.

    Attributes:
        dtype: Its dtype.
        channels: The negative axes of its input and its output channels.
        kind: The method's name.
    """

    dtype: np.dtype
    channels: tuple[int, int]
    kind: str = "tucker"
    establishes = frozenset({RANK})
    replaces = True

    def apply(self, w: Leaf, learned: PyTree) -> TuckerArray:
        """The product of the parts, still apart; ``w`` itself is not used."""
        del w
        parts = learned["first"], learned["core"], learned["last"]
        return TuckerArray(*parts, self.dtype, self.channels)

    def compress(self, w: Leaf, learned: PyTree, path: str) -> TuckerArray:
        """The parts."""
        del path
        return self.apply(w, learned)


@answers(ELSEWHERE)
def tucker(
    ranks: tuple[int, int] | None = None,
    energy: float | None = None,
    where: Where = None,
    *,
    ratio: float | None = None,
    inputs: int | None = None,
    stack: int = 0,
) -> Compression:
    r"""Replaces kernels of convolutions by three smaller convolutions.

    .. math:: W_{hwio} \approx \sum_{ab} A_{ia} G_{hwab} B_{bo}

    Under `lift` the first is of size 1 to fewer channels, the second has the window and strides of
    the kernel, and the third is of size 1 to the outputs: fewer bytes, and fewer operations. In
    training the parts learn, and the dense kernel stays as it was.

    Args:
        ranks: The channels of the core's inputs and outputs; those of a kernel with fewer stay as
            many. Or
        energy: the share of the sum of squares to keep along either axis, in ``(0, 1]``; or
        where: Which parameters: kernels whose contracted axes are a window and input channels, of
            which the latter are beside the output channels unless ``inputs`` says where. Name those
            of convolutions.
        ratio: Or how many times smaller than a kernel its parts are at least, both ranks being the
            same share of their channels.
        inputs: The negative axis of the input channels, such as -4 of kernels ``IOHW``, whose
            output channels have other axes on both sides.
        stack: As in `low_rank`.

    Returns:
        A `Compression` that stores `TuckerArray`.

    Raises:
        ValueError: Not exactly one of ``ranks``, ``energy`` and ``ratio`` given, or out of range;
            in ``init``: a kernel without a window, or in a stack, or one whose input channels
            may be on either side of the outputs.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"kernel": jnp.ones((3, 3, 16, 32))}
        >>> jc.compress(params, jc.tucker(ranks=(4, 8)), layout="in,out")["kernel"]
        TuckerArray(tucker 4x8, float32[3,3,16,32], 4.22 bits per weight, 2,432 bytes)

    References:
        Kim et al., 2016, Compression of Deep Convolutional Neural Networks for Fast and Low Power
        Mobile Applications.
    """
    given = {k: v for k, v in (("ranks", ranks), ("energy", energy), ("ratio", ratio)) if v}
    if len(given) != 1:
        raise ValueError(f"give one of ranks, energy and ratio, not {given or 'none'}")
    if ranks is not None and (len(ranks) != 2 or min(ranks) < 1):
        raise ValueError(f"ranks={ranks}; they are two, of inputs and outputs, at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}; it is the share of the squares kept, in (0, 1]")
    if ratio is not None and not ratio >= 1:
        raise ValueError(f"ratio={ratio}; it is how many times smaller a kernel gets, at least 1")

    def check(parameter: Parameter) -> None:
        channels = channels_of(parameter, inputs)
        if ratio is not None:
            _of_ratio(parameter, sizes_of(parameter, channels), ratio)
        if energy is not None and is_traced(parameter.dense()):
            raise NeedsValues(
                f"energy={energy} needs the values of {parameter.describe()} to choose ranks: run "
                "init outside of jit, or give ranks="
            )

    def init(parameter: Parameter) -> Decision:
        channels, dense = channels_of(parameter, inputs), parameter.dense()
        w, sizes = as_three_way(dense, channels), sizes_of(parameter, channels)
        if ratio is not None:
            inner, outer = _of_ratio(parameter, sizes, ratio)
        elif energy is not None:
            inner, outer = (_of_energy(x, energy) for x in mode_energies(w))
        else:
            assert ranks is not None
            inner, outer = min(ranks[0], sizes[1]), min(ranks[1], sizes[2])
        state = TuckerState(np.dtype(dense.dtype), channels)
        parts = _within(dense.dtype, *tucker2(w, inner, outer))
        return Decision(state, parts_of(dense, channels, *parts))

    asked = spelled("tucker", **given, where=where, inputs=inputs, stack=stack or None)
    return compression_of(LeafMethod(check, init), where, stack=stack, asked=asked)


def channels_of(parameter: Parameter, inputs: int | None = None) -> tuple[int, int]:
    """The axes of input and output channels: of those summed over, the one beside the outputs.

    Args:
        parameter: The parameter.
        inputs: The axis of input channels, if the caller says it.

    Raises:
        TypeError: It is compressed already.
        ValueError: It is no single kernel with a window, or either side may be the inputs'.
    """
    value, layout = parameter.value, parameter.layout
    if is_compressed(value) and not isinstance(value, MaskedArray):
        raise TypeError(
            f"{parameter.describe()} is a {type(value).__name__} and cannot be factorized; "
            "materialize it first"
        )
    beside = [d for d in layout.contracting if any(abs(d - o) == 1 for o in layout.output)]
    if inputs is not None:
        beside = [d for d in layout.contracting if d == inputs]
    window = len(layout.contracting) > 1 and len(layout.output) == 1 and not layout.stack
    if not (window and beside and all(value.shape)):
        where = "" if inputs is None else f", and inputs={inputs}"
        raise ValueError(
            f"{parameter.describe()} is no kernel of a convolution, with a window, one axis of "
            f"output channels and no stack: its contracted axes are {layout.contracting}, its "
            f"output axes {layout.output} and its stack axes {layout.stack}{where}; exclude it"
        )
    if len(beside) > 1:
        raise ValueError(
            f"{parameter.describe()} has output channels {layout.output} between other axes, and "
            f"either of {tuple(beside)} may be the input channels: say inputs={min(beside)} or "
            f"inputs={max(beside)}"
        )
    return beside[0], layout.output[0]


def sizes_of(parameter: Parameter, channels: tuple[int, int]) -> tuple[int, int, int]:
    """The entries of the window, and the input and output channels."""
    shape = parameter.value.shape
    i, o = (shape[d] for d in channels)
    return int(np.prod(shape)) // (i * o), i, o


def as_three_way(dense: jax.Array, channels: tuple[int, int]) -> jax.Array:
    """A kernel as ``[s, i, o]``: positions of the window, input and output channels."""
    last = jnp.moveaxis(dense, channels, (-2, -1))
    return last.reshape(-1, *last.shape[-2:])


def parts_of(
    dense: jax.Array, channels: tuple[int, int], first: Any, core: Any, last: Any
) -> dict[str, jax.Array]:
    """``[i, a]``, ``[s, a, b]`` and ``[b, o]`` as the fields of a `TuckerArray` of a kernel."""
    window = [n for d, n in enumerate(dense.shape) if d - dense.ndim not in channels]

    def placed(x: jax.Array, window: list[int]) -> jax.Array:
        x = x.reshape(*window, *x.shape[-2:])
        return jnp.moveaxis(x, (-2, -1), channels).astype(dense.dtype)

    ones = [1] * len(window)
    return {
        "first": placed(first, ones),
        "core": placed(core, window),
        "last": placed(last, ones),
    }


def _within(
    dtype: np.dtype, first: jax.Array, core: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The parts, of which the outer ones take over what of the core's size is too large.

    One entry of the core may be as large as the norm of the kernel, beyond float16.
    """
    most = jnp.finfo(dtype).maxexp - 1
    _, exponent = jnp.frexp(jnp.max(jnp.abs(core)))
    half = jnp.maximum(exponent - most + 1, 0) // 2
    scaled = lambda x: jnp.ldexp(x, half)
    return scaled(first), jnp.ldexp(core, -2 * half), scaled(last)


def _of_ratio(parameter: Parameter, sizes: tuple[int, int, int], ratio: float) -> tuple[int, int]:
    """The largest ranks, of one share of both channels, whose parts take no more."""
    s, i, o = sizes
    room = s * i * o / ratio
    for share in np.linspace(1, 0, 1000, endpoint=False):
        a, b = max(1, int(share * i)), max(1, int(share * o))
        if i * a + s * a * b + b * o <= room:
            return a, b
    raise ValueError(
        f"ratio={ratio} leaves {int(room)} entries for {parameter.describe()}, and ranks of 1 take "
        f"{i + s + o}; ask for less, or exclude it"
    )


def _of_energy(squares: jax.Array, energy: float) -> int:
    kept = np.cumsum(np.asarray(squares, np.float64))
    return min(int(np.sum(kept < energy * kept[-1])) + 1, len(kept))
