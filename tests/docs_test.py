"""The documents: what is public has a place in the reference, and links lead somewhere."""

import collections
import re

from docs import hooks

TEXTS = {".md", ".py"}
COMMAND = re.compile(r"python (?:-m )?((?:examples|benchmarks)(?:[./]\w+)+)([^`\n]*)")
LINK = re.compile(r"\]\(([\w./-]+)(?:#[^)\s]*)?\)")


def pages():
    return [hooks.ROOT / page for page in hooks.PAGES] + sorted(hooks.ROOT.glob("docs/**/*.md"))


def test_each_public_name_has_one_place_in_the_reference():
    places = collections.Counter(name for name, _ in hooks.documented_names())
    public = set(hooks.public_names())
    assert len(public) > 150
    assert sorted(public - set(places)) == [], "write `::: jc.name` in a page of docs/api/"
    assert sorted(set(places) - public) == [], "not public"
    assert [name for name, count in places.items() if count > 1] == []


def test_a_missing_name_would_be_found():
    assert {"scores.wanda", "bounds.mse", "quantize", "QuantizedArray"} <= set(hooks.public_names())
    assert "bounds.lax" not in set(hooks.public_names())


def test_directives_name_the_place_of_definition():
    heading = "heading: jc.quantize\n      toc_label: quantize"
    want = f"::: jaxopt_compress.quantization.quantize.quantize\n    options:\n      {heading}"
    assert hooks.on_page_markdown("::: jc.quantize", _page("api/x.md"), None, None) == want


def test_links_between_pages_of_different_folders():
    markdown = "[a](docs/recipes.md) [b](examples/) [c](benchmarks/README.md#on-a-gpu)"
    got = hooks.on_page_markdown(markdown, _page("index.md"), None, None)
    assert got == "[a](recipes.md) b [c](benchmarks.md#on-a-gpu)"
    got = hooks.on_page_markdown("[d](../../README.md)", _page("principles/x.md"), None, None)
    assert got == "[d](../index.md)"


def test_links_lead_to_files():
    for page in pages():
        for target in LINK.findall(page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_is_in_the_navigation():
    navigation = (hooks.ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"([\w/]+\.md)", navigation)
    there = {str(page.relative_to(hooks.ROOT / "docs")) for page in hooks.ROOT.glob("docs/**/*.md")}
    assert sorted(listed) == sorted(there | set(hooks.PAGES.values()))


def _page(source):
    page = collections.namedtuple("Page", "file")
    return page(collections.namedtuple("File", "src_uri")(source))


def test_commands_in_texts_exist():
    """Examples and benchmarks that are named have their file, and the options that are shown."""
    folders = [hooks.ROOT / folder for folder in ("docs", "examples", "benchmarks")]
    texts = [file for folder in folders for file in folder.rglob("*") if file.suffix in TEXTS]
    found = 0
    for file in [hooks.ROOT / "README.md", *texts]:
        for module, rest in COMMAND.findall(file.read_text().replace("\\\n", " ")):
            script = hooks.ROOT / f"{module.removesuffix('.py').replace('.', '/')}.py"
            assert script.exists(), f"{file} names {module}"
            # Those of a whole flow share their options.
            source = script.read_text() + (hooks.ROOT / "examples/flow.py").read_text()
            for option in re.findall(r"--[a-z][\w-]*", rest):
                assert f'"{option}"' in source, f"{file}: {module} {option}"
                found += 1
    assert found > 50
