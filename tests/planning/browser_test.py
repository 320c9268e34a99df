"""Pages in a headless browser: nothing overflows a phone, and both colour schemes are readable."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc

pytest.importorskip("vl_convert")
pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_phone_in_both_schemes(scheme, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    rng = np.random.default_rng(0)
    params = {f"layer{i}": jnp.asarray(rng.normal(size=(32, 8)), "f4") for i in range(4)}
    small = jc.compress(params, jc.quantize("int4"), layout="in,out")
    path = tmp_path / "report.html"
    jc.report(params, small, histograms=10).html(path, recipe="quantize = 'int4' " * 40)
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(path.as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        style = page.evaluate("[getComputedStyle(document.body).color, "
                              "getComputedStyle(document.body).backgroundColor]")  # fmt: skip
        assert page.locator("svg").count() == 4
        browser.close()
    assert asked == [path.as_uri()] and not wrong
    assert width <= 390
    text, back = (sum(map(int, x.split("(")[1].rstrip(")").split(",")[:3])) for x in style)
    if scheme == "dark":
        assert text > 600 and back < 90
    else:
        assert text < 150  # on the browser's own white
