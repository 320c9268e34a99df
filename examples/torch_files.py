"""Reads tensors from files of `torch.save` before version 1.6, without torch."""

import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "LongStorage": "<i8"}


class Storage(NamedTuple):
    """Numbers that follow the pickles in the file."""

    kind: str
    key: str


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unpickler(pickle.Unpickler):
    """Builds tensors and dicts and nothing else: pickles of strangers may call anything."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("builtins", "set"), ("__builtin__", "set")):
            return set
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: Tensor(
                storage, offset, shape, strides
            )
        if module == "torch" and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: tuple[Any, ...]) -> Storage:
        """A storage, from its description."""
        if pid[0] != "storage":
            raise pickle.UnpicklingError(f"the file asks for {pid[0]!r}, which is no storage")
        return Storage(pid[1], pid[2])


def read(path):
    """{name: array} of a file that holds a dict of tensors, such as a state_dict."""
    with path.open("rb") as file:
        if Unpickler(file).load() != MAGIC:
            raise ValueError(f"{path} is no file of torch.save before version 1.6")
        # The version, and what is known of the machine that wrote it.
        Unpickler(file).load(), Unpickler(file).load()
        tensors, keys = Unpickler(file).load(), Unpickler(file).load()
        dtypes = {t.storage.key: np.dtype(DTYPES[t.storage.kind]) for t in tensors.values()}
        numbers = {}
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            content = file.read(count * dtypes[key].itemsize)
            numbers[key] = np.frombuffer(content, dtypes[key])
    return {name: _array(t, numbers[t.storage.key]) for name, t in tensors.items()}


def _array(tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    bytes_apart = [stride * numbers.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, bytes_apart)
    return np.array(view, order="C")
