"""Deselects the tests of this folder where there is no GPU."""

from pathlib import Path

import pytest
import torch

from tools.gpu_check.pytest_plugin import check_folder, record_figures, seconds_left  # noqa: F401

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for_gpus = [item for item in items if HERE in item.path.parents]
    config.hook.pytest_deselected(items=for_gpus)
    items[:] = [item for item in items if HERE not in item.path.parents]
