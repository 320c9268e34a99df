"""A file with the recipe of `command.py`."""

import pytest

from tests.cli.command import RECIPE


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path
