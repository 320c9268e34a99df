"""What a checkpoint outlives: killed savers, and savers at the same time."""

import concurrent.futures
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.storage.trees import assert_equal

# Forks processes that save version after version, and kills each of them at some moment after its
# first save. They are forked before JAX starts threads.
KILLED = """
import itertools, os, random, signal, sys, time
import numpy as np
import orbax.checkpoint
import jaxopt_compress as jc

path, kills = sys.argv[1], int(sys.argv[2])
random.seed(0)
n = 0

def tree(n):
    return {"w": np.full((400, 300), n, np.float32), "b": [np.full(7, n, np.int32), n]}

for _ in range(kills):
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        for i in itertools.count(n + 1):
            jc.save(path, tree(i), overwrite=True)
            os.write(into, b".")
    os.close(into)
    done = len(os.read(out, 1))
    time.sleep(random.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(out, 4096):
        done += len(more)
    os.close(out)
    n += done
    print(n, flush=True)
    # The one that was under way may have been complete.
    n += int(sys.stdin.readline())
"""


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(kills, tmp_path):
    path = tmp_path / "ckpt"
    command = [sys.executable, "-c", KILLED, path, str(kills)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as killer:
        for _ in range(kills):
            complete = int(killer.stdout.readline())
            found = jc.load(path)
            n = found["b"][1]
            assert n in (complete, complete + 1)
            want = {"w": np.full((400, 300), n, np.float32), "b": [np.full(7, n, np.int32), n]}
            assert_equal(found, want)
            killer.stdin.write(f"{n - complete}\n")
    assert killer.returncode == 0
    jc.save(path, {"w": np.ones(3)}, overwrite=True)
    assert names(path) == ["checkpoint.jsonl", "data-", "lock"]


def names(path):
    """The names in a folder, those of data without what is unique."""
    return sorted(f"{f.name.partition('-')[0]}-" if f.is_dir() else f.name for f in path.iterdir())


@pytest.mark.parametrize("moment", ["write", "replace_document"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_checkpoint(moment, error, tmp_path, monkeypatch):
    jc.save(tmp_path / "ckpt", {"w": jnp.zeros(3)})

    def interrupted(folder, *_):
        (folder / "half").parent.mkdir(exist_ok=True)
        (folder / "half").write_text("")
        raise error

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(f"jaxopt_compress.storage.saving.{moment}", interrupted)
        jc.save(tmp_path / "ckpt", {"w": jnp.ones(3)}, overwrite=True)
    assert_equal(jc.load(tmp_path / "ckpt"), {"w": jnp.zeros(3)})
    if moment == "write":
        assert names(tmp_path / "ckpt") == ["checkpoint.jsonl", "data-", "lock"]


def test_a_save_that_was_never_completed_is_no_checkpoint(tmp_path):
    jc.save(tmp_path / "ckpt", {"w": jnp.zeros(3)})
    (tmp_path / "ckpt" / "checkpoint.jsonl").unlink()
    with pytest.raises(jc.CheckpointError, match="never saved to its end"):
        jc.load(tmp_path / "ckpt")
    jc.save(tmp_path / "ckpt", {"w": jnp.ones(3)})
    assert_equal(jc.load(tmp_path / "ckpt"), {"w": jnp.ones(3)})
    assert names(tmp_path / "ckpt") == ["checkpoint.jsonl", "data-", "lock"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_checkpoint_is_never_overwritten(overwrite, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("kept")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "text"):
        with pytest.raises(FileExistsError, match=f"{path.name} .*choose another path"):
            jc.save(path, {"w": jnp.ones(3)}, overwrite=overwrite)
    assert (tmp_path / "thesis" / "text").read_text() == "kept"


def test_a_damaged_checkpoint_is_kept_until_another_is_complete(tmp_path):
    path = tmp_path / "ckpt"
    jc.save(path, {"w": jnp.zeros(3)})
    (path / "checkpoint.jsonl").write_bytes(b"{}")
    with pytest.raises(TypeError):
        jc.save(path, {"w": object()}, overwrite=True)
    assert names(path) == ["checkpoint.jsonl", "data-", "lock"]
    jc.save(path, {"w": jnp.ones(3)}, overwrite=True)
    assert_equal(jc.load(path), {"w": jnp.ones(3)})
    assert names(path) == ["checkpoint.jsonl", "data-", "lock"]


def test_threads_save_and_load_at_once(tmp_path):
    tree = lambda i: {"w": np.full(5000, i, np.float32), "i": i}
    together = threading.Barrier(8)

    def work(i):
        together.wait(timeout=60)
        for _ in range(2):
            jc.save(tmp_path / str(i), tree(i), overwrite=True)
            assert_equal(jc.load(tmp_path / str(i)), tree(i))
            jc.save(tmp_path / "shared", tree(i), overwrite=True)
            found = jc.load(tmp_path / "shared")
            assert_equal(found, tree(found["i"]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, i) for i in range(8)]:
            future.result(timeout=120)
    for i in (*range(8), "shared"):
        assert names(tmp_path / str(i)) == ["checkpoint.jsonl", "data-", "lock"]


def test_of_threads_that_save_to_a_new_path_one_wins(tmp_path):
    def work(i):
        try:
            jc.save(tmp_path / "new", {"i": np.full(10, i)})
        except FileExistsError:
            return None
        return i

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = [i for i in pool.map(work, range(8)) if i is not None]
    assert len(done) == 1
    assert_equal(jc.load(tmp_path / "new"), {"i": np.full(10, done[0])})


SAVER = """
import sys
import numpy as np
import jaxopt_compress as jc

path, i = sys.argv[1], int(sys.argv[2])
sys.stdin.readline()
for _ in range(20):
    jc.save(path, {"w": np.full((300, 300), i, np.float32), "i": i}, overwrite=True)
"""


@pytest.mark.slow
def test_processes_save_to_one_path_while_another_loads(tmp_path):
    path = tmp_path / "ckpt"
    jc.save(path, {"w": np.zeros((300, 300), np.float32), "i": 0})
    command = [sys.executable, "-c", SAVER, path]
    savers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, text=True) for i in (1, 2)
    ]
    for saver in savers:
        saver.stdin.write("\n")
        saver.stdin.flush()
    seen = set()
    while any(saver.poll() is None for saver in savers):
        found = jc.load(path)
        assert_equal(found, {"w": np.full((300, 300), found["i"], np.float32), "i": found["i"]})
        seen.add(found["i"])
    for saver in savers:
        saver.stdin.close()
        assert saver.wait() == 0
    assert seen >= {1, 2} and names(path) == ["checkpoint.jsonl", "data-", "lock"]
