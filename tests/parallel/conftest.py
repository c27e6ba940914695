"""transformers' answers to compare with."""

from pathlib import Path

import pytest
from made_once import made_once
from ranks import run_script

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> Path:
    """A folder with every small model in HF format and what transformers computes with it."""
    return made_once(
        tmp_path_factory, "oracle", lambda folder: run_script(HERE, ["oracle.py", str(folder)])
    )


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> Path:
    """A folder with score models and what transformers computes with them."""
    return made_once(
        tmp_path_factory,
        "scored",
        lambda folder: run_script(HERE, ["score_oracle.py", str(folder)]),
    )
