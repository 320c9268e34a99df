"""The import order of the package, and that what is public is documented."""

import ast
import inspect
import re
from pathlib import Path

import jaxopt_compress as jc

PACKAGE = Path(jc.__file__).parent
ROOMS = [
    {"typing"},
    {"extras"},
    {"distillation"},
    {"numerics"},
    {"kernels"},
    {"arrays"},
    {"tree"},
    {"lift"},
    {"rewriting"},
    {"compression"},
    {"sparsity", "quantization", "low_rank"},
    {"sharing"},
    {"removal"},
    {"transforms"},
    {"parallel"},
    {"precision"},
    {"storage"},
    {"deployment"},
    {"post_training"},
    {"planning"},
    {"evaluation"},
    {"search"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imported_rooms(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names = [node.module or ""]
            if node.module == "jaxopt_compress":
                names = [f"jaxopt_compress.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("jaxopt_compress."))


def test_a_room_imports_only_rooms_above_it():
    files = [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py"]
    assert len(files) > 30
    for file in files:
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported_rooms(file):
            assert other == room or LEVEL[other] < LEVEL[room], f"{file} imports {other}"


def test_private_api_of_jax_stays_in_compat():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "_compat.py":
            assert "jax._src" not in file.read_text(), f"{file} uses private API"


def test_modules_stay_short():
    for folder in ("jaxopt_compress", "tests", "examples", "benchmarks"):
        for file in (PACKAGE.parent / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 300, f"{file} is too long"


def test_functions_stay_short():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                if doc := ast.get_docstring(node, clean=False):
                    length -= doc.count("\n") + 1
                assert length <= 60, f"{file}: {node.name} has {length} lines"


def test_every_public_function_has_an_example():
    """On real data: in examples/ or benchmarks/."""
    folders = (PACKAGE.parent / folder for folder in ("examples", "benchmarks"))
    text = "\n".join(file.read_text() for folder in folders for file in folder.rglob("*.py"))
    used = set(re.findall(r"\bjc\.(\w+)", text))
    functions = {name for name in jc.__all__ if inspect.isfunction(getattr(jc, name))}
    assert not functions - used


def test_every_public_name_is_documented():
    assert list(jc.__all__) == sorted(jc.__all__)
    for name in jc.__all__:
        value = getattr(jc, name)
        doc = inspect.getdoc(value)
        assert doc, f"{name} has no docstring"
        if inspect.isfunction(value) and inspect.signature(value).parameters:
            assert any(part in doc for part in ("Args:", "Returns:", "Example:")), name
