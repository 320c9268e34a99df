"""What processes that save together tell each other; nothing where there is one process.

They meet at the coordination service of `jax.distributed`, and no device takes part. So a thread
may save while devices compute.
"""

import itertools
import threading
from typing import Any, ClassVar, Self

import jax
import numpy as np

# Longer than any checkpoint takes. The service itself sees that a process has died.
_PATIENCE_MS = 24 * 3600 * 1000


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


class Meeting:
    """The processes of one save, and its turn among the saves of this process.

    Saves follow each other in the order in which their meetings were made, in whichever threads,
    since orbax counts what it does by process. All processes make them in the same order. ``with``
    waits for the turn; a meeting that never comes to that has to be left.
    """

    _turns: ClassVar = threading.Condition()
    _waiting: ClassVar[list["Meeting"]] = []
    _numbers: ClassVar = itertools.count()

    def __init__(self) -> None:
        with Meeting._turns:
            self._prefix = f"jaxopt_compress/save/{next(Meeting._numbers)}"
            Meeting._waiting.append(self)

    def __enter__(self) -> Self:
        try:
            with Meeting._turns:
                Meeting._turns.wait_for(lambda: Meeting._waiting[0] is self)
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait_for_all("saved")
                if jax.process_count() > 1 and is_first():
                    _service().key_value_delete(self._prefix)
        finally:
            self.leave()

    def leave(self) -> None:
        """Gives the turn to the next."""
        with Meeting._turns:
            Meeting._waiting.remove(self)
            Meeting._turns.notify_all()

    def wait_for_all(self, step: str) -> None:
        """Returns when all processes are here."""
        if jax.process_count() > 1:
            _service().wait_at_barrier(f"{self._prefix}/{step}", _PATIENCE_MS)

    def from_first(self, text: str) -> str:
        """The text of the first process, in all of them."""
        if jax.process_count() == 1:
            return text
        key = f"{self._prefix}/first"
        if is_first():
            _service().key_value_set(key, text)
        return _service().blocking_key_value_get(key, _PATIENCE_MS)

    def sum_of_all(self, values: np.ndarray) -> np.ndarray:
        """The sum over processes of their uint32 arrays of one shape, whose rows are mostly 0."""
        if jax.process_count() == 1:
            return values
        flat = values.reshape(len(values), -1)
        own = np.flatnonzero(flat.any(1))
        told = np.concatenate([own[:, None].astype(np.uint32), flat[own]], 1)
        _service().key_value_set_bytes(self._key(jax.process_index()), told.tobytes())
        total = np.zeros_like(flat)
        for process in range(jax.process_count()):
            raw = _service().blocking_key_value_get_bytes(self._key(process), _PATIENCE_MS)
            found = np.frombuffer(raw, np.uint32).reshape(-1, 1 + flat.shape[1])
            np.add.at(total, found[:, 0], found[:, 1:])
        return total.reshape(values.shape)

    def _key(self, process: int) -> str:
        return f"{self._prefix}/values/{process}"


def _service() -> Any:
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()
