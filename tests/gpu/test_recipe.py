"""Three steps of the flagship recipe in miniature: see recipe_runs.py."""

import pytest
import recipe_runs
from gpu_miniatures import check_fp8, device_kind, num_gpus


@pytest.mark.slow
@pytest.mark.parametrize("case", recipe_runs.CASES)
def test_recipe(case, check_folder, record_figures):
    if case.startswith("fp8"):
        check_fp8()
    if case == "nccl" and device_kind() != "cpu" and num_gpus() < 2:
        pytest.skip(f"it needs 2 GPUs, and {num_gpus()} are here")
    recipe_runs.check(case, check_folder, record_figures)
