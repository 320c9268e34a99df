"""HTML files: whole, without network, with what they were made of."""

import html.parser
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

pytest.importorskip("vl_convert")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Tags that are open, headings, cells, and the sources of anything from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.headings, self.cells, self.sources = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(0)
    params = {f"a<{i}>": {"w[x]": jnp.asarray(rng.normal(size=(32, 8)), "f4")} for i in range(2)}
    return params, jc.compress(params, jc.quantize("int4"), layout="in,out")


def read(path):
    text = path.read_text()
    page = Page(text)
    assert not page.sources, "something is loaded from elsewhere"
    assert not re.findall(r"url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert len(text) < 300_000
    return page


def test_a_report_has_its_table_charts_and_recipe(trees, tmp_path):
    params, small = trees
    found = jc.report(params, small, histograms=10)
    counts = found["leaves"][0]["histogram"]
    w = np.asarray(params["a<0>"]["w[x]"])
    assert sum(counts["before"]) == sum(counts["after"]) == w.size
    want = np.histogram(w, np.linspace(counts["low"], counts["high"], 11))[0]
    np.testing.assert_array_equal(counts["before"], want)
    schedules = {"sparsity": jc.schedules.polynomial(0.5, begin=0, end=10)}
    path = tmp_path / "report.html"
    found.html(path, recipe="where = '**/<kernel>'", schedules=schedules, steps=20)
    page = read(path)
    assert page.headings == ["Compression report", "Before and after", "Error by layer",
                             "Bits and sparsity", "Weights", "Schedules", "Recipe"]  # fmt: skip
    for word in ("a<0>/w[x]", "int4", "total"):
        assert word in page.cells
    charts = [attrs for tag, attrs in page.seen if tag == "svg"]
    assert len(charts) == 5 and all(a["role"] == "img" and a["aria-label"] for a in charts)
    labels = " ".join(a.get("aria-label", "") for _, a in page.seen)
    assert "a<0>/w[x]" in labels
    with pytest.raises(ValueError, match="steps="):
        found.html(path, schedules=schedules)


@pytest.mark.ci
def test_plans_and_comparisons_have_pages_too(trees, tmp_path):
    params, small = trees
    fn = lambda p, x: (x @ p["a<0>"]["w[x]"]) @ p["a<1>"]["w[x]"].T
    x = jnp.ones((4, 32))
    plan = jc.plan(fn, params, jc.quantize("int4"), x, chip="h100")
    plan.html(tmp_path / "plan.html")
    page = read(tmp_path / "plan.html")
    assert "Recipe" in page.headings and "bound by" in page.cells
    batches = [(x, jnp.zeros(4, int))]
    stats = jc.calibrate(fn, params, [x])
    found = jc.compare(
        fn, {"a": params, "b": small}, batches, ["accuracy", "per_class"], rounds=0, stats=stats
    )
    path = tmp_path / "compare.html"
    found.html(path, reports={"b": jc.report(params, small)}, recipe="int4")
    page = read(path)
    assert page.headings[1:6] == ["Before and after", "Differences and noise",
                                  "Quality against bytes", "Error by layer", "Classes"]  # fmt: skip
    assert "McNemar" in page.cells and "Bits and sparsity: b" in page.headings
