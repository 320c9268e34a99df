"""Globs against a reference that follows their definition, and how long they take."""

import fnmatch
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_compress as jc
from jaxopt_compress.tree.globs import Glob, glob_matches


@pytest.mark.parametrize(
    "pattern, yes, no",
    [
        ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"], ["kernels", "a/xkernel", "kernel/a"]),
        ("*/kernel", ["a/kernel"], ["kernel", "a/b/kernel"]),
        ("a/**", ["a", "a/b", "a/b/c"], ["ab", "b/a"]),
        ("a/**/c", ["a/c", "a/b/c", "a/b/b/c"], ["ac", "a/bc"]),
        ("a/**/**", ["a", "a/b"], ["b"]),
        ("**", ["", "a", "a/b"], []),
        ("", [""], ["a"]),
        ("a?/b*", ["ax/b", "ax/bcd"], ["a/b", "ax/b/c", "axy/b"]),
        ("layers/[01]/w", ["layers/0/w", "layers/1/w"], ["layers/2/w", "layers/01/w"]),
        ("[!a-c]x", ["dx"], ["ax", "bx", "/x", "x"]),
        ("w[[]0].+(x)", ["w[0].+(x)"], ["w0", "w[0]xx"]),
        ("w[0", ["w[0"], ["w0"]),
    ],
)
def test_globs(pattern, yes, no):
    assert all(glob_matches(pattern, path) for path in yes)
    assert not any(glob_matches(pattern, path) for path in no)


def reference(pattern, path):
    """Whether names fit pieces, by trying out every way to share them."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(reference(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and one(pattern[0], path[0]) and reference(pattern[1:], path[1:])


def one(piece, name):
    """As `reference`, for the characters of one name."""
    if not piece:
        return not name
    if piece[0] == "*":
        return any(one(piece[1:], name[i:]) for i in range(len(name) + 1))
    if found := re.match(r"\[(!?)([ab])\]", piece):
        wanted = bool(name) and (name[0] == found[2]) != bool(found[1])
        return wanted and one(piece[found.end() :], name[1:])
    return bool(name) and piece[0] in ("?", name[0]) and one(piece[1:], name[1:])


PIECES = st.lists(st.sampled_from(["a", "b", "*", "?", "[a]", "[!b]"]), max_size=4).map("".join)
PATTERNS = st.lists(st.one_of(st.just("**"), PIECES.filter(lambda p: "**" not in p)), max_size=5)
NAMES = st.lists(st.text("ab", max_size=4), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(PATTERNS.filter(bool), NAMES)
def test_globs_fit_what_their_definition_says(pattern, names):
    assert glob_matches("/".join(pattern), "/".join(names)) == reference(pattern, names)


def test_globs_compare_each_name_with_each_piece_at_most_once(monkeypatch):
    calls = []
    fits = fnmatch.fnmatchcase
    monkeypatch.setattr(fnmatch, "fnmatchcase", lambda *a: calls.append(a) or fits(*a))
    names, pieces = ["a"] * 40, [*["**", "a"] * 15, "z"]
    assert not glob_matches("/".join(pieces), "/".join(names))
    assert 0 < len(calls) <= len(names) * len(pieces)


def test_wildcards_within_a_name_end():
    """Backtracking over all ways to share 2000 letters among 30 stars would not."""
    assert not glob_matches("**/**/**/" + "a*" * 30 + "z", "a" * 2000)
    assert not glob_matches("**/**/**/**/x*y*z*", "/".join(["x" * 60 + "y" * 60] * 30))


@pytest.mark.parametrize(
    "pattern, better",
    [
        ("**kernel", "**/*kernel"),
        ("a**/b", "a*/**/b"),
        ("a/w**", "a/w*/**"),
        ("x**y", "x*/**/*y"),
        ("***", "**"),
    ],
)
def test_stars_for_names_and_within_a_name_are_not_mixed(pattern, better):
    with pytest.raises(ValueError, match=re.escape(f"did you mean {better!r}")):
        glob_matches(pattern, "a")
    glob_matches(better, "a")


def test_globs_refuse_other_values():
    with pytest.raises(TypeError, match="a glob is a string"):
        Glob(["**"])  # pyright: ignore
    with pytest.raises(TypeError, match="min_ndim=True: it is a rank"):
        jc.Glob("**", min_ndim=True)
    with pytest.raises(ValueError, match="did you mean"):
        jc.Glob("**x")
    assert repr(Glob("a")) == "Glob('a')" and repr(Glob("a", 1)) == "Glob('a', min_ndim=1)"
