"""Real data: readers, and the command that fetches it with the weights of pretrained models.

    python -m examples.data                    # what there is
    python -m examples.data mnist minilm       # fetches and checks these sets

The folders, and how they get there: `examples.fetching`.
"""

import argparse
import csv
import gzip
import re
import sys
from pathlib import Path

import numpy as np

from examples.fetching import SETS, DataError, cache, fetch

STSB = Path(__file__).parent / "stsb"


def mnist():
    """((60000, 28, 28) uint8, (60000,) uint8) to train with, and 10000 of each to test with.

    References:
        LeCun et al., 1998, Gradient-Based Learning Applied to Document Recognition.
    """
    return _images(fetch("mnist"), "")


def fashion_mnist():
    """As `mnist`.

    References:
        Xiao et al., 2017, Fashion-MNIST.
    """
    return _images(fetch("fashion_mnist"), ".gz")


def _images(folder, suffix):
    parts = ((f"{part}-images-idx3", f"{part}-labels-idx1") for part in ("train", "t10k"))
    return tuple(tuple(idx(folder / f"{n}-ubyte{suffix}") for n in names) for names in parts)


def idx(path):
    """An array of bytes in the format of MNIST."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    # Of the header byte 3 is the rank, and four bytes are for each length.
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def ml100k():
    """(100000, 4) int64: user 1..943, film 1..1682, rating 1..5 and Unix time; and film -> title.

    References:
        Harper and Konstan, 2015, The MovieLens Datasets.
    """
    folder = fetch("ml100k")
    ratings = np.loadtxt(folder / "ml-100k.inter", delimiter="\t", skiprows=1).astype(np.int64)
    with (folder / "ml-100k.item").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return ratings, {int(row[0]): row[1] for row in rows}


def brown():
    """[(document, category, text)] of 500 documents; split by document for held-out text.

    References:
        Francis and Kučera, 1964, A Standard Corpus of Present-Day Edited American English.
    """
    folder, documents = fetch("brown"), []
    for line in (folder / "cats.txt").read_text().split("\n"):
        if line.strip():
            name, category = line.split()
            tagged = (folder / name).read_text("latin-1").split("\n")
            words = ([w.rsplit("/", 1)[0] for w in s.split()] for s in tagged if s.strip())
            documents.append((name, category, "\n".join(map(_sentence, words))))
    return documents


def _sentence(words):
    """Words as one writes them: no space before punctuation, quotation marks open and close."""
    text = " ".join(words).replace("``", '"').replace("''", '"')
    text = re.sub(r" ([,.;:?!)])", r"\1", text)
    # The corpus doubles these marks.
    text = re.sub(r"([;?!]) ?\1", r"\1", text).replace("( ", "(")
    parts = re.split(r' ?" ?', text)
    text = "".join(part + (' "', '" ')[i % 2] for i, part in enumerate(parts[:-1])) + parts[-1]
    return text.replace('" ,', '",').replace('" .', '".').strip()


def bbcnews():
    """[(class, text)] of 2225 articles.

    References:
        Greene and Cunningham, 2006, Practical Solutions to the Problem of Diagonal Dominance in
        Kernel Document Clustering.
    """
    files = sorted(f for f in fetch("bbcnews").glob("*/*"))
    return [(f.parent.name, f.read_text("utf-8", errors="replace")) for f in files]


def cmudict():
    """[(word, [phoneme, ...])]; second pronunciations are written word(2)."""
    lines = (fetch("g2p") / "cmudict.dict").read_text("utf-8").splitlines()
    rows = (line.split("#")[0].split() for line in lines)
    return [(row[0], row[1:]) for row in rows if row]


def stsb(split):
    """[(sentence, sentence, similarity 0..5)] of "train", "dev" or "test"; see stsb/README.md.

    References:
        Cer et al., 2017, SemEval-2017 Task 1: Semantic Textual Similarity.
    """
    with (STSB / f"stsb-en-{split}.csv").open(encoding="utf-8", newline="") as file:
        return [(a, b, float(score)) for a, b, score in csv.reader(file)]


def main():
    """Fetches what is named, or lists what there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETS))
    names = parser.parse_args().names
    if unknown := [n for n in names if n not in SETS]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(SETS)}")
    for name in names:
        try:
            print(f"{name}: {fetch(name)}, SHA-256 as expected")
        except DataError as error:
            sys.exit(f"{name}: {error}")
    for name, each in ({} if names else SETS).items():
        there = "cached" if (cache() / name).exists() else f"{each.megabytes} MB"
        print(f"{name:20} {there:>8}  {each.about}")


if __name__ == "__main__":
    main()
