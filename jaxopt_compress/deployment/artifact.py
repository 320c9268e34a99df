"""A folder with a compiled-to-be program and the compressed weights that it takes."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export as jax_export
import jax.numpy as jnp
import numpy as np

from jaxopt_compress.deployment import loader
from jaxopt_compress.lift import lift
from jaxopt_compress.tree import nbytes
from jaxopt_compress.typing import PyTree


def export(
    path: str | os.PathLike[str],
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    on_fallback: Literal["warn", "error", "densify"] = "warn",
) -> None:
    """Writes a function and its compressed weights as a folder that jax and numpy alone can run.

    The weights are arguments of the program and no constants in it, so that they are in the folder
    at their stored width, and on the device once for all programs that share them.

    Args:
        path: A new folder:

            ``program.bin``   the lifted function, as StableHLO of `jax.export`,
            ``weights.bin``   the arrays of ``params``, one after the other, codes packed,
            ``weights.json``  their shapes and types,
            ``load.py``       the loader, which needs jax and numpy.
        fn: ``fn(params, *args)``; not lifted.
        params: A tree with compressed arrays.
        *args: Arrays or their types, ``jax.ShapeDtypeStruct``. Dimensions may be symbols, such as a
            batch of any size: ``jax.export.symbolic_shape("batch, 28, 28")``.
        platforms: What the program is lowered for.
        on_fallback: As `lift` takes it.

    Raises:
        FileExistsError: There is something at ``path``.

    Example:
        >>> import runpy, tempfile, jax, jax.numpy as jnp, jaxopt_compress as jc
        >>> fn = lambda params, x: x @ params["w"]
        >>> small = jc.compress({"w": jnp.ones((64, 32))}, jc.quantize("int4"))
        >>> x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 64"), "float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jc.export(f"{folder}/artifact", fn, small, x)
        ...     load = runpy.run_path(f"{folder}/artifact/load.py")["load"]
        ...     load(f"{folder}/artifact")(jnp.ones((3, 64))).shape
        (3, 32)
    """
    folder = Path(path)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another path")
    weights, treedef = jax.tree.flatten(params)
    lifted = lift(fn, on_fallback=on_fallback)

    def program(weights: list[Any], *args: PyTree) -> PyTree:
        return lifted(treedef.unflatten(weights), *args)

    exported = jax_export.export(jax.jit(program), platforms=tuple(platforms))(weights, *args)
    folder.mkdir(parents=True)
    (folder / "program.bin").write_bytes(exported.serialize())
    index, begin = [], 0
    with open(folder / "weights.bin", "wb") as file:
        for x in map(np.asarray, weights):
            raw, bits = _packed(x)
            file.write(raw)
            known = {"shape": list(x.shape), "dtype": x.dtype.name, "bits": bits}
            index.append(known | {"begin": begin, "end": begin + len(raw)})
            begin += len(raw)
    (folder / "weights.json").write_text(json.dumps(index))
    shutil.copy(loader.__file__, folder / "load.py")


def _packed(x: np.ndarray) -> tuple[bytes, int]:
    """The bytes of an array, several entries to a byte where they fit, and the bits of an entry."""
    bits = nbytes(jax.ShapeDtypeStruct((8,), x.dtype))  # Eight entries take as many bytes.
    if bits >= 8:
        return np.ascontiguousarray(x).tobytes(), bits
    wide = np.int8 if jnp.issubdtype(x.dtype, jnp.signedinteger) else np.uint8
    codes = x.astype(wide) if jnp.issubdtype(x.dtype, jnp.integer) else x
    flat = np.ascontiguousarray(codes).view(np.uint8).reshape(-1) & np.uint8((1 << bits) - 1)
    flat = np.pad(flat, (0, -len(flat) % (8 // bits))).reshape(-1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8).tobytes(), bits
