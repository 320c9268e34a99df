"""Runs what `jaxopt_compress.export` wrote. Needs jax and numpy, and nothing else.

This file is in the artifact, as `load.py`:

    import runpy
    fn = runpy.run_path("artifact/load.py")["load"]("artifact")
    fn(*args)
"""

import json
import math
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


def load(folder):
    """The exported function, its weights on the default device.

    Args:
        folder: The artifact.

    Returns:
        ``fn(*args)``, compiled at its first call for each shape of its arguments.
    """
    folder = pathlib.Path(folder)
    exported = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    call, weights = jax.jit(exported.call), jax.device_put(read_weights(folder))
    return lambda *args: call(weights, *args)


def read_weights(folder):
    """The arrays that the program takes first, in the types that it takes them in."""
    index = json.loads((pathlib.Path(folder) / "weights.json").read_text())
    stored = np.memmap(pathlib.Path(folder) / "weights.bin", np.uint8, "r")
    return [_array(stored[at["begin"] : at["end"]], at) for at in index]


def _array(raw, at):
    dtype, count = jnp.dtype(at["dtype"]), math.prod(at["shape"])
    if (bits := at["bits"]) == 8 * dtype.itemsize:
        return np.frombuffer(raw.tobytes(), dtype).reshape(at["shape"])
    # Several entries to a byte, the first one lowest.
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = ((raw[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
    if jnp.issubdtype(dtype, jnp.signedinteger):
        codes = (codes.astype(np.int8) ^ (1 << (bits - 1))) - (1 << (bits - 1))
    integer = jnp.issubdtype(dtype, jnp.integer)
    return (codes.astype(dtype) if integer else codes.view(dtype)).reshape(at["shape"])
