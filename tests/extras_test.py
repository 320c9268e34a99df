"""The package without what its extras install."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

import jaxopt_compress as jc
from jaxopt_compress.demo import run
from jaxopt_compress.extras import require

OPTIONAL = ("rich", "tyro", "matplotlib", "sklearn", "safetensors")


def test_modules_are_returned():
    assert require("json.decoder", extra="cli") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("module", "package"), [("rich.table", "rich"), ("sklearn", "scikit-learn")]
)
def test_the_message_names_package_and_extra(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    message = rf"^this needs {package}: pip install 'jaxopt-compress\[some\]'$"
    with pytest.raises(ModuleNotFoundError, match=message):
        require(module, extra="some")


def test_what_a_package_itself_lacks_is_another_error(tmp_path, monkeypatch):
    (tmp_path / "incomplete.py").write_text("import lacking_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'lacking_module'"):
        require("incomplete", extra="cli")


def test_the_package_and_reports_need_none_of_them():
    """In a process of its own, since modules that are loaded hide what they have imported."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import jax.numpy as jnp, jaxopt_compress as jc
params = {{"w": jnp.ones((8, 2))}}
print(jc.report(params, jc.compress(params, jc.quantize("int8"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, rule, row, _, total = done.stdout.splitlines()
    assert head.split()[:3] == ["leaf", "shape", "method"] and set(rule) == {"-", " "}
    assert row.split()[:3] == ["w", "8x2", "int8"] and total.startswith("total")


def test_tables_in_color_need_rich(monkeypatch):
    params = {"w": jnp.ones((4, 2))}
    found = jc.report(params, params)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxopt-compress\[cli\]"):
        found.__rich__()


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_the_demo_says_so_before_it_starts(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxopt-compress\[examples\]"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
