import nccl_push
import pytest
from gpu_miniatures import num_gpus


@pytest.mark.slow
def test_pushes_over_nccl_and_engines_killed_in_them(record_figures):
    if num_gpus() < 2:
        pytest.skip(f"it needs 2 GPUs, and {num_gpus()} are here")
    nccl_push.check(record_figures)
