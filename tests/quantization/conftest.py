"""`make test` runs one format of each kind; those that differ in width alone run when asked for."""

import pytest

from jaxopt_compress.numerics.formats import FORMATS

EACH_KIND = (
    *("int8", "int4", "int3", "ternary", "binary", "nf4", "pot4"),
    *("float8_e4m3fn", "float6_e2m3fn", "mxfp4", "nvfp4"),
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "quantization" and hasattr(item, "callspec"):
            if item.callspec.params.get("name") in FORMATS.keys() - EACH_KIND:
                item.add_marker(pytest.mark.slow)
