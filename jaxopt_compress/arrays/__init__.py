"""What a compressed parameter is."""

from jaxopt_compress.arrays.base import (
    CompressedArray,
    describe,
    is_compressed,
    map_dense,
    map_factors,
    materialize,
)
from jaxopt_compress.arrays.codebook import CodebookArray
from jaxopt_compress.arrays.fake_quantized import FakeQuantizedArray
from jaxopt_compress.arrays.input_quantized import InputQuantizedArray
from jaxopt_compress.arrays.leaf_types import compressed_array
from jaxopt_compress.arrays.low_rank import LowRankArray
from jaxopt_compress.arrays.masked import MaskedArray
from jaxopt_compress.arrays.permuted import PermutedArray
from jaxopt_compress.arrays.quantized import QuantizedArray
from jaxopt_compress.arrays.rotated import RotatedArray
from jaxopt_compress.arrays.scaled import ScaledArray
from jaxopt_compress.arrays.sparse import SparseArray
from jaxopt_compress.arrays.summed import SumArray
from jaxopt_compress.arrays.tensor_train import TensorTrainArray
from jaxopt_compress.arrays.tucker import TuckerArray

__all__ = [
    "CodebookArray",
    "CompressedArray",
    "FakeQuantizedArray",
    "InputQuantizedArray",
    "LowRankArray",
    "MaskedArray",
    "PermutedArray",
    "QuantizedArray",
    "RotatedArray",
    "ScaledArray",
    "SparseArray",
    "SumArray",
    "TensorTrainArray",
    "TuckerArray",
    "compressed_array",
    "describe",
    "is_compressed",
    "map_dense",
    "map_factors",
    "materialize",
]
