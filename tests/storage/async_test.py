"""Checkpoints that a thread writes while the program goes on."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.storage import saving
from tests.storage.trees import assert_equal, everything


@pytest.mark.parametrize("coding", [None, "ans"])
def test_an_async_save_is_the_save(coding, tmp_path):
    tree = everything()
    jc.save_async(tmp_path / "ckpt", tree, coding=coding).result()
    jc.save(tmp_path / "other", tree, coding=coding)
    assert_equal(jc.load(tmp_path / "ckpt", like=tree), jc.load(tmp_path / "other", like=tree))


@pytest.fixture
def held(monkeypatch):
    """Saves write nothing until the event is set."""
    free = threading.Event()
    write = saving.write
    monkeypatch.setattr(saving, "write", lambda *args: (free.wait(60), write(*args))[1])
    yield free
    free.set()


def test_what_is_donated_or_changed_afterwards_was_copied(held, tmp_path):
    mesh = jax.make_mesh((4,), ("x",))
    host = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    split = jax.device_put(host, NamedSharding(mesh, P("x")))
    small = jc.compress({"w": split, "v": jnp.asarray(host)}, jc.quantize("int4"), layout="in,out")
    own = host.copy()
    tree = {"dense": split, "alone": jnp.asarray(host), "small": small, "own": own}
    want = jax.tree.map(np.array, tree)
    future = jc.save_async(tmp_path / "ckpt", tree)
    own[:] = 0
    negative = jax.jit(lambda x: (-x).astype(x.dtype), donate_argnums=0)
    for x in jax.tree.leaves((tree["dense"], tree["alone"], tree["small"])):
        negative(x)
    assert split.is_deleted() and not future.done()
    held.set()
    future.result()
    found = jax.tree.map(np.asarray, jc.load(tmp_path / "ckpt"))
    assert_equal(found, want)


def test_saves_follow_each_other_in_the_order_of_their_calls(held, tmp_path):
    futures = [
        jc.save_async(tmp_path / "ckpt", {"i": np.full(3, i)}, overwrite=True) for i in range(5)
    ]
    assert not any(future.done() for future in futures)
    held.set()
    jc.save(tmp_path / "ckpt", {"i": np.full(3, 5)}, overwrite=True)
    assert all(future.done() for future in futures)
    assert_equal(jc.load(tmp_path / "ckpt"), {"i": np.full(3, 5)})


def test_errors_come_at_once_or_with_the_result_and_do_not_stop_the_next(tmp_path, monkeypatch):
    path = tmp_path / "ckpt"
    jc.save(path, {"w": jnp.zeros(3)})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jc.save_async(path, {"w": jnp.ones(3)})
    with pytest.raises(TypeError, match="'w'"):
        jc.save_async(path, {"w": object()}, overwrite=True)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(saving, "write", full)
        with pytest.warns(RuntimeWarning, match=r"ckpt was not saved: OSError: no space left"):
            future = jc.save_async(path, {"w": jnp.ones(3)}, overwrite=True)
            with pytest.raises(OSError, match="no space"):
                future.result()
            threading.Event().wait(0.1)  # The warning follows the result.
    assert_equal(jc.load(path), {"w": jnp.zeros(3)})
    jc.save(path, {"w": jnp.ones(3)}, overwrite=True)
    assert_equal(jc.load(path), {"w": jnp.ones(3)})


def test_one_that_is_cancelled_before_it_begins_does_not_stop_the_next(tmp_path, monkeypatch):
    class Slow(concurrent.futures.ThreadPoolExecutor):
        """Cancels what has not begun."""

        def submit(self, *args):
            future = concurrent.futures.Future()
            assert args and future.cancel()
            return future

    with monkeypatch.context() as patched:
        patched.setattr(saving, "ThreadPoolExecutor", Slow)
        assert jc.save_async(tmp_path / "ckpt", {"w": jnp.zeros(3)}).cancelled()
    jc.save(tmp_path / "ckpt", {"w": jnp.ones(3)})
    assert_equal(jc.load(tmp_path / "ckpt"), {"w": jnp.ones(3)})
