"""What a checkpoint outlives: killed savers, savers at the same time, and damage."""

import concurrent.futures
import contextlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from tests.array_contract import LEAVES
from tests.storage.checkpoint_test import assert_equal

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, what is in it, and its files."""
    leaves = ("int4", "uint3", "rows", "2:4", "low_rank", "nvfp4")
    tree = {
        "leaves": {leaf.name: leaf.example().leaf for leaf in LEAVES if leaf.name in leaves},
        "dense": np.random.default_rng(0).normal(size=(40, 30)),
        "rest": [jax.random.key(3), 0.1, jnp.arange(900, dtype=jnp.bfloat16), "text"],
    }
    path = tmp_path_factory.mktemp("whole") / "ckpt"
    jc.save(path, tree)
    return path, tree, sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)


def is_refused(path, tree):
    """Whether a checkpoint is refused; if not, it has to be what was saved."""
    try:
        found = jc.load(path)
    except jc.CheckpointError as error:
        assert str(path) in str(error)
        return True
    assert_equal(found, tree)
    return False


@contextlib.contextmanager
def replaced(file, content):
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize("flips", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_each_flipped_bit_is_refused_or_carries_nothing(flips, whole):
    path, tree, files = whole
    rng = np.random.default_rng(flips)
    sizes = np.array([f.stat().st_size for f in files])
    refused = 0
    for _ in range(flips):
        # Half of them by file, so that small ones have their share.
        weights = sizes if rng.random() < 0.5 else np.ones(len(files))
        file = files[rng.choice(len(files), p=weights / weights.sum())]
        content = file.read_bytes()
        with replaced(file, flipped(content, rng.integers(8 * len(content)))):
            found = is_refused(path, tree)
        assert found or file.name != "checkpoint.jsonl"
        refused += found
    # The others are in copies that orbax makes of small arrays and of its indices.
    assert refused > flips / 3


def test_each_flipped_bit_of_an_array_is_refused_by_its_name(whole):
    path, tree, files = whole
    rng = np.random.default_rng(0)
    for name, array in (("dense", tree["dense"]), ("rest/2", np.asarray(tree["rest"][2]))):
        data = array.tobytes()
        (file,) = (f for f in files if data in f.read_bytes())
        content = file.read_bytes()
        start = 8 * content.index(data)
        for bit in (0, 8 * len(data) - 1, *rng.integers(8 * len(data), size=10)):
            with replaced(file, flipped(content, start + bit)):
                with pytest.raises(jc.CheckpointError, match=rf"data-\w+ .*'{name}': its part"):
                    jc.load(path)


@pytest.mark.parametrize("how", ["zeroed", "truncated", "emptied", "lengthened"])
def test_each_damaged_file_is_refused_or_carries_nothing(how, whole):
    path, tree, files = whole
    refused = set()
    for file in files:
        content = file.read_bytes()
        half = content[: len(content) // 2]
        new = {"zeroed": bytes(len(content)), "truncated": half, "emptied": b""}
        with replaced(file, new.get(how, content + b"\0")):
            if is_refused(path, tree):
                refused.add(file.relative_to(path).parts[-1 if file.parent == path else 1])
    # Of its other files, orbax reads from an offset as many bytes as there were.
    parts = {"_METADATA", "d", "ocdbt.process_0"} if how != "lengthened" else {"_METADATA"}
    assert refused >= {"checkpoint.jsonl", "manifest.ocdbt"} | parts


def test_arrays_of_another_checkpoint_are_refused(whole, tmp_path):
    path, tree, _ = whole
    shutil.copytree(path, tmp_path / "ckpt")
    other = dict(tree, dense=tree["dense"] + 1)
    jc.save(tmp_path / "other", other)
    (own,), (theirs,) = ((tmp_path / p).glob("data-*") for p in ("ckpt", "other"))
    shutil.rmtree(own)
    shutil.copytree(theirs, own)
    with pytest.raises(jc.CheckpointError, match=r"data-\w+ .*'dense': its part .*checksum"):
        jc.load(tmp_path / "ckpt")
    shutil.rmtree(own)
    with pytest.raises(jc.CheckpointError, match="ckpt/data-"):
        jc.load(tmp_path / "ckpt")
    shutil.copy(tmp_path / "other" / "checkpoint.jsonl", tmp_path / "ckpt")
    with pytest.raises(jc.CheckpointError, match="ckpt/data-"):
        jc.load(tmp_path / "ckpt")
