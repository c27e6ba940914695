"""What tests of several hosts share: a recipe that is made once."""

import pytest
from small_run import write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """Three steps of a model that learns nothing in seconds; every test gives a run its folder."""
    return write_recipe(tmp_path_factory.mktemp("cluster"), steps=3)
