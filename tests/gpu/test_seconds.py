"""Numbers for `megatron-r1 plan --calibrate`: see step_seconds.py and decode_seconds.py."""

import decode_seconds
import pytest
import step_seconds


@pytest.mark.slow
def test_micro_batch(check_folder, record_figures):
    step_seconds.check("micro-batch", check_folder, record_figures)


@pytest.mark.slow
def test_decoding_pass(check_folder, record_figures, seconds_left):
    decode_seconds.check(check_folder, record_figures, seconds_left)


@pytest.mark.slow
def test_phases(check_folder, record_figures):
    step_seconds.check("phases", check_folder, record_figures)
