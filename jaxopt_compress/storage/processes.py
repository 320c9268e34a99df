"""What processes that save together tell each other; nothing where there is one process."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(step: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxopt_compress.save: {step}")


def from_first(text: str) -> str:
    """The text of the first process, at most 255 bytes, in all of them."""
    if jax.process_count() == 1:
        return text
    raw = text.encode()[:255]
    held = np.frombuffer(raw.ljust(255, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(held))).rstrip(b"\0").decode()


def sum_of_all(values: np.ndarray) -> np.ndarray:
    """The sum over processes of their uint32 arrays."""
    if jax.process_count() == 1:
        return values
    gathered: Any = multihost_utils.process_allgather(values)
    return np.asarray(gathered).sum(0, dtype=np.uint32)
