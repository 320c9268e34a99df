"""A matrix as a chain of small matrices, one for each digit of its rows and columns."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxopt_compress.arrays.base import CompressedArray, describe, is_compressed, materialize
from jaxopt_compress.arrays.fields import check_length, pad_spec
from jaxopt_compress.arrays.layout import Layout
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.numerics.rounding import seal
from jaxopt_compress.numerics.tensor_train import train_product
from jaxopt_compress.typing import Leaf


class TrainSizes(NamedTuple):
    """The sizes of the cores ``[r, n, m, s]`` of a tensor train, one entry for each.

    Attributes:
        ranks: ``r``, and 1 at the end, which is ``s`` of the last.
        rows: ``n``, the digits of a row's number, the first counts the most.
        columns: ``m``, likewise.
    """

    ranks: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


@compressed_array(data=["cores"], static=["dtype", "rows", "columns", "cut"])
class TensorTrainArray(CompressedArray):
    """``w[(i1 .. id), (j1 .. jd)] = sum_r G1[1, i1, j1, r1] G2[r1, i2, j2, r2] .. Gd[.., 1]``.

    With two cores this is a sum of Kronecker products, one for each rank. The first digit of a row
    or a column counts the most. A core of sizes ``[r, n, m, s]`` is held as a matrix of ``r n`` by
    ``m s`` entries, so that it keeps the rank of the dense array, and is quantized as any matrix.

    Attributes:
        cores: One for each digit, ``[*stack, r n, m s]``, an array or a compressed one.
        dtype: The floating dtype of the dense array.
        rows: The sizes of the digits of a row, without the first one's.
        columns: Those of a column.
        cut: How many rows and columns at the end are no part of the dense array.
    """

    cores: tuple[Leaf, ...]
    dtype: np.dtype
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    cut: tuple[int, int] = (0, 0)

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def sizes(self) -> TrainSizes:
        """The sizes of all cores, from their shapes.

        Raises:
            ValueError: They do not fit each other.
        """
        shapes = [tuple(x.shape) for x in self.cores]
        same = len({shape[:-2] for shape in shapes}) == 1 and min(map(len, shapes)) >= 2
        if same and len(shapes) - 1 == len(self.rows) == len(self.columns):
            inner = [s[-2] // n for s, n in zip(shapes[1:], self.rows, strict=True)]
            ranks = (1, *inner, 1)
            sizes = TrainSizes(
                ranks,
                (shapes[0][-2], *self.rows),
                (shapes[0][-1] // max(ranks[1], 1), *self.columns),
            )
            want = [
                (r * n, m * s)
                for r, n, m, s in zip(ranks, sizes.rows, sizes.columns, ranks[1:], strict=False)
            ]
            if want == [shape[-2:] for shape in shapes]:
                return sizes
        raise ValueError(
            f"the cores {shapes} of a TensorTrainArray whose further digits are {self.rows} and "
            f"{self.columns} do not fit: only leading axes can be mapped over or scanned "
            "(in_axes=0), and columns can be split into no more parts than their first digit has"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The stack, and the products of all digits less what is cut.

        Raises:
            ValueError: The cores do not fit each other.
        """
        sizes = self.sizes
        stack = tuple(self.cores[0].shape[:-2])
        rows, columns = math.prod(sizes.rows), math.prod(sizes.columns)
        return (*stack, rows - self.cut[0], columns - self.cut[1])

    def multiplications(self, rows: bool = True) -> int:
        """How many a product with one vector takes that goes from core to core.

        Args:
            rows: Whether rows are summed over, and cores met from the first on; otherwise columns,
                and from the last.
        """
        ranks, *digits = self.sizes
        summed, left = digits if rows else digits[::-1]
        order = range(len(summed)) if rows else range(len(summed))[::-1]
        total, done, rest = 0, 1, math.prod(summed)
        for k in order:
            rest //= summed[k]
            total += done * rest * ranks[k] * summed[k] * left[k] * ranks[k + 1]
            done *= left[k]
        return total

    def check(self) -> None:
        """As in every compressed array."""
        if type(self.cores) is not tuple or not self.cores:
            raise ValueError(f"cores={self.cores!r}; they are a tuple of one or more")
        for size in (*self.rows, *self.columns):
            check_length("a digit", size)
        for x in (self, *self.cores):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{x.dtype} where it has to be floating")
        if len(self.cut) != 2 or min(self.cut) < 0 or min(self.shape[-2:]) < 1:
            raise ValueError(f"cut={self.cut}")

    def describe(self) -> str:
        """The ranks between cores, and the form of these."""
        parts = list(dict.fromkeys(map(describe, self.cores)))
        of = "" if parts == ["dense"] else f" of {' and '.join(parts)}"
        inner = "-".join(map(str, self.sizes.ranks[1:-1]))
        return f"tensor train {inner or 1}{of}"

    def materialize(self) -> jax.Array:
        """The product of the cores, in float32 from the first on, rounded once to ``dtype``."""
        (rows, columns), sizes = self.shape[-2:], self.sizes
        every = list(zip(sizes.ranks, sizes.rows, sizes.columns, sizes.ranks[1:], strict=False))

        def product(*cores: jax.Array) -> jax.Array:
            blocks = [x.reshape(*x.shape[:-2], *n) for x, n in zip(cores, every, strict=True)]
            dense = train_product(blocks, float(jnp.finfo(self.dtype).max))
            return seal(dense[..., :rows, :columns], self.dtype)

        cores = materialize(self.cores)
        sharding = getattr(jax.typeof(cores[0]), "sharding", None)
        if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
            # Types cannot say how digits are split; rows and columns are as those of the first.
            whole = jax.sharding.auto_axes(product, out_sharding=sharding)
            return whole(*cores)  # pyright: ignore
        return product(*cores)

    def specs(self, spec: PartitionSpec) -> "TensorTrainArray":
        """Stack axes are split in each core; rows and columns are split by their first digit.

        Raises:
            ValueError: ``spec`` splits an axis of which the end is cut off.
        """
        entries = pad_spec(spec, self.ndim)
        stack, ends = entries[:-2], entries[-2:]
        for name, entry, cut in zip(("rows", "columns"), ends, self.cut, strict=True):
            if entry is not None and cut:
                raise ValueError(
                    f"the {name} of a TensorTrainArray of shape {self.shape} cannot be split by "
                    f"{spec}: {cut} more at the end are no part of it"
                )
        own = [PartitionSpec(*stack, *ends)]
        own += [PartitionSpec(*stack, None, None)] * (len(self.cores) - 1)
        pairs = zip(self.cores, own, strict=True)
        return self.replace(cores=tuple(x.specs(s) if is_compressed(x) else s for x, s in pairs))

    def factors(self) -> dict[str, Leaf]:
        """The cores by their positions."""
        return {str(i): x for i, x in enumerate(self.cores)}

    def with_factors(self, factors: Mapping[str, Leaf]) -> "TensorTrainArray":
        """The same product of other cores."""
        return self.replace(cores=tuple(factors[str(i)] for i in range(len(self.cores))))

    def factor_layouts(self, layout: Layout) -> dict[str, Layout]:
        """Cores sum over what the matrix sums over, and over a rank."""
        turned = -1 in layout.contracting
        own = Layout((-1,), (-2,), layout.stack) if turned else Layout((-2,), (-1,), layout.stack)
        return dict.fromkeys(self.factors(), own)

    def factor_inputs(self, name: str, layout: Layout) -> jax.Array | None:
        """No matrix makes what a core meets of the inputs: one that fits none of them."""
        del name, layout
        return jnp.zeros((0, 0))
