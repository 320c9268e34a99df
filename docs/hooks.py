"""Additions to mkdocs: names of the reference, and pages from other folders than `docs/`."""

import importlib
import posixpath
import re
import types
from collections.abc import Iterator
from pathlib import Path

import jaxopt_compress as jc

ROOT = Path(__file__).parent.parent
# Files outside of docs/ that are pages of the site, too.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "jaxopt_compress/kernels/README.md": "kernels.md",
}
_DIRECTIVE = re.compile(r"^::: jc\.(\S+)$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def public_names() -> Iterator[str]:
    """Every public name: those of the package, and those of the modules among them."""
    for name in jc.__all__:
        value = getattr(jc, name)
        if not isinstance(value, types.ModuleType):
            yield name
            continue
        listed = getattr(value, "__all__", None)
        if listed is None:
            listed = [n for n, v in vars(value).items() if _defined_in(value, n, v)]
        yield from (f"{name}.{n}" for n in listed)


def documented_names() -> Iterator[tuple[str, Path]]:
    """Every name of a directive `::: jc.name` in a page of the reference, and the page."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        yield from ((name, page) for name in _DIRECTIVE.findall(page.read_text()))


def on_pre_build(config):
    """Ends the build if the reference lacks a public name."""
    from mkdocs.exceptions import PluginError

    missing = sorted(set(public_names()) - {name for name, _ in documented_names()})
    if missing:
        raise PluginError(f"write `::: jc.{missing[0]}` in a page of docs/api/; missing: {missing}")


def on_files(files, config):
    """Adds the pages from other folders."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Resolves names of the reference, and links to files elsewhere in the repository."""
    source = {page_: source for source, page_ in PAGES.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(source or f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():  # An address, or code that reads like a link.
            return match[0]
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            return text  # A file of the repository that is no page.
        return f"[{text}]({posixpath.relpath(path, here or '.')}{anchor})"

    return _LINK.sub(link, _DIRECTIVE.sub(lambda match: _resolved(match[1]), markdown))


def _resolved(name: str) -> str:
    # A function and its module often share a name, which static analysis takes for the module: so
    # directives name the place of definition.
    owner, _, last = f"jaxopt_compress.{name}".rpartition(".")
    root, *rest = owner.split(".")
    module = importlib.import_module(root)
    for part in rest:
        module = getattr(module, part)
    value = getattr(module, last)
    home = getattr(value, "__module__", "")
    if not home.startswith("jaxopt_compress") or getattr(value, "__name__", last) != last:
        home = module.__name__  # An alias of a type, or an instance.
    return f"::: {home}.{last}\n    options:\n      heading: jc.{name}\n      toc_label: {name}"


def _defined_in(module: types.ModuleType, name: str, value: object) -> bool:
    home = getattr(value, "__module__", None)
    return not name.startswith("_") and callable(value) and home == module.__name__
