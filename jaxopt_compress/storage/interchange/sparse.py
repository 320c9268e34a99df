"""2:4 sparse matrices as compressed-tensors keeps them (``sparse-24-bitmask``)."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.arrays import SparseArray
from jaxopt_compress.arrays.sparse import sparse_nm
from jaxopt_compress.storage.interchange.fields import check_layout

FORMAT = "sparse-24-bitmask"
# The last names of its tensors: kept values [out, in / 2], bits of the mask, and the dense shape.
NAMES = ("compressed", "bitmask", "shape")


def tensors_of(path: str, leaf: SparseArray, layout: str) -> dict[str, np.ndarray]:
    """The tensors of a leaf.

    Args:
        path: For messages.
        leaf: A matrix with two floats among each four inputs.
        layout: ``"out,in"`` or ``"in,out"``, the order of the leaf's axes.

    Raises:
        ValueError: It has another pattern, or runs along another axis; says what has a form.
    """
    check_layout(layout)
    inputs = -1 if layout == "out,in" else -2
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    if leaf.pattern != (2, 4) or leaf.axis != inputs or leaf.ndim != 2 or not floats:
        raise ValueError(
            f"{path!r} of shape {leaf.shape} cannot be written: of sparse weights only matrices "
            f"have a form, with 2:4 floats along the inputs of {layout}, not {leaf.describe()}; "
            "prune with pattern='2:4', or materialize it"
        )
    dense, mask = (np.asarray(x) for x in (leaf.materialize(), leaf.mask()))
    if layout == "in,out":
        dense, mask = dense.T, mask.T
    if dense.shape[1] % 4:
        raise ValueError(f"{path!r}: its {dense.shape[1]} inputs are no multiple of 4")
    # Two of each four are kept, also where fewer are under the mask: these come first, then others.
    order = np.argsort(~mask.reshape(len(mask), -1, 4), axis=-1, kind="stable")
    kept = np.zeros(order.shape, bool)
    np.put_along_axis(kept, order[..., :2], True, -1)
    kept = kept.reshape(mask.shape)
    return {
        "compressed": dense[kept].reshape(len(dense), -1),
        "bitmask": np.packbits(kept, axis=-1, bitorder="little"),
        "shape": np.array(dense.shape, np.int64).reshape(-1, 1),
    }


def leaf_of(tensors: Mapping[str, np.ndarray]) -> SparseArray:
    """The leaf, [out, in], of its tensors.

    Raises:
        ValueError: They do not fit each other.
    """
    values, words = tensors["compressed"], tensors["bitmask"]
    if values.ndim != 2 or words.ndim != 2 or words.dtype != np.uint8:
        raise ValueError("its values and the bytes of its mask are no matrices")
    out, size = map(int, np.ravel(tensors["shape"]))
    mask = np.unpackbits(words, axis=-1, bitorder="little")[:, :size].astype(bool)
    fours = mask.reshape(out, -1, 4).sum(-1) if mask.shape == (out, size) and not size % 4 else None
    if fours is None or (fours != 2).any() or values.shape != (out, size // 2):
        raise ValueError(f"its mask and values are no 2:4 pattern of {out} by {size}")
    dense = np.zeros((out, size), values.dtype)
    dense[mask] = values.reshape(-1)
    return sparse_nm(jnp.asarray(dense), jnp.asarray(mask), 2, 4, -1)


def config_of(every: list[str], targets: list[str]) -> dict[str, object]:
    """What ``config.json`` says of sparse weights: all names of weights, and those that are."""
    return {
        "format": FORMAT,
        "sparsity_structure": "2:4",
        "targets": targets,
        "ignore": sorted(set(every) - set(targets)),
        "global_sparsity": 0.5,
    }
