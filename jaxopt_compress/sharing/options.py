"""What a call of `share` asks for, of any parameter."""

import dataclasses
from typing import Any

from jaxopt_compress.arrays import MaskedArray, SparseArray, is_compressed
from jaxopt_compress.compression import Parameter
from jaxopt_compress.numerics.clusters import INITS
from jaxopt_compress.numerics.shared import Books
from jaxopt_compress.tree import Layout


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `share` that are not about which parameters."""

    clusters: int
    init: str
    group_size: int | None
    vector: int
    codebooks: int
    per: str
    zero: bool | None
    key: Any
    iterations: int
    held: str
    begin: int
    every: int | None

    @property
    def moves(self) -> bool:
        """Whether parameters are trained on, since codes are decided again."""
        return self.every is not None

    @property
    def numbers(self) -> bool:
        """Whether an entry has a code, and one alone."""
        return self.vector == 1 and self.codebooks == 1

    def books(self, parameter: Parameter) -> Books:
        """How a parameter is cut."""
        layout, shape = parameter.layout, parameter.value.shape
        axis = _axis(layout, len(shape))
        apart = {*layout.stack, *(layout.output if self.per == "channel" else ())} - {axis}
        groups = 1 if self.group_size is None else shape[axis] // self.group_size
        return Books(axis, groups, self.vector, tuple(sorted(apart)))

    def pins(self, parameter: Parameter) -> bool:
        """Whether the first centroid is 0."""
        return parameter.keep is None and self.numbers if self.zero is None else self.zero


def _axis(layout: Layout, rank: int) -> int:
    """The axis along which vectors and groups run: the last one that is contracted."""
    free = (d for d in range(-1, -rank - 1, -1) if d not in layout.stack)
    axis = layout.group_axis
    return next(free) if axis is None else axis


def check_options(options: Options) -> None:
    """Refuses options out of range."""
    init, key = options.init, options.key
    if not 2 <= options.clusters <= 2**16:
        raise ValueError(f"clusters={options.clusters}; there are at least 2, at most 65536")
    if init not in INITS:
        raise ValueError(f"init={init!r}; there are {', '.join(map(repr, INITS))}")
    if (key is None) == (init in ("kmeans++", "random")):
        need = "needs key=jax.random.key(...)" if key is None else "draws nothing: leave out key="
        raise ValueError(f"init={init!r} {need}")
    if options.per not in ("tensor", "channel"):
        raise ValueError(f"per={options.per!r}; there are 'tensor' and 'channel'")
    if options.held not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"centroid_dtype={options.held!r}; there are 'float32', 'bfloat16' and 'float16'"
        )
    for name, value in (("vector", options.vector), ("group_size", options.group_size or 1)):
        if value < 1:
            raise ValueError(f"{name}={value}; it holds at least one entry")
    if not 1 <= options.codebooks <= 16:
        raise ValueError(f"codebooks={options.codebooks}; a vector has 1 to 16 codes")
    if options.zero and options.codebooks > 1:
        raise ValueError(f"zero=True with codebooks={options.codebooks}: sums hold no exact 0")
    begin, every, iterations = options.begin, options.every, options.iterations
    if begin < 0 or iterations < 0 or (every is not None and every < 1):
        raise ValueError(
            f"begin={begin}, every={every}, iterations={iterations}: begin and iterations are at "
            "least 0, and every at least 1"
        )


def check_parameter(options: Options, parameter: Parameter) -> None:
    """Refuses a parameter that cannot share values so."""
    value, shape = parameter.value, tuple(parameter.value.shape)
    if is_compressed(value) and not isinstance(value, (SparseArray, MaskedArray)):
        raise TypeError(
            f"{parameter.describe()} is already a {type(value).__name__} and cannot share values; "
            "materialize it first"
        )
    if len(shape) <= len(parameter.layout.stack):
        raise ValueError(f"{parameter.describe()} has one entry each and none to share: exclude it")
    length = shape[_axis(parameter.layout, len(shape))]
    unit = options.group_size or options.vector
    if length % unit or unit % options.vector:
        raise ValueError(
            f"{parameter.describe()}: group_size={options.group_size} and vector={options.vector} "
            f"do not divide the {length} entries of its last contracted axis; take divisors, or "
            "exclude it by where="
        )
    if parameter.keep is not None and not options.numbers:
        what, why, take = ("vector", "a vector has one code, whichever entries are 0", "vector=1")
        if options.vector == 1:
            what, why, take = ("codebooks", "sums hold no exact 0", "codebooks=1")
        raise ValueError(
            f"chain: share with {what}={getattr(options, what)} cannot follow what prunes "
            f"{parameter.describe()}: {why}; take {take}"
        )
