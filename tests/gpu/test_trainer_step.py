"""A step of the trainer on GPUs against the CPU's, by parallel layout: see trainer_layers.py."""

import pytest
import trainer_layers


@pytest.mark.slow
@pytest.mark.parametrize("case", trainer_layers.CASES)
def test_step(case, check_folder, record_figures):
    trainer_layers.compare(case, check_folder, record_figures)
