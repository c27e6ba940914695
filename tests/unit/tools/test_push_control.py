"""The bench of the control path, with 8 + 4 processes instead of 256: each fault happens, and the
ranks that cannot end the push name it."""

import pytest

from megatron_r1.push.matching import EngineLayout, TrainerGrid
from tools.bench.host import run_in_process
from tools.bench.push import control


@pytest.mark.parametrize(
    "fault",
    [
        "engine rank killed",
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("trainer rank killed", marks=pytest.mark.slow),
        pytest.param("engine killed", marks=pytest.mark.slow),
        pytest.param("engine rank hangs", marks=pytest.mark.slow),
    ],
)
def test_each_fault_is_named_by_the_ranks_it_stops(fault, tmp_path):
    # The ranks are forked, and a fork of this process, whose libraries have threads, may crash.
    found = run_in_process(small_run, fault, tmp_path)
    assert found["right"], found
    assert found["killed"] == {"none": 0, "engine killed": 2, "engine rank hangs": 0}.get(fault, 1)
    assert bool(found["engine ranks that report an error"]) == (fault != "none")


def small_run(fault, folder):
    control.GRID = TrainerGrid(8, tensor=2, pipeline=2, expert=2)
    control.ENGINE, control.ENGINES = EngineLayout(tensor_parallel=2, expert_parallel=True), 2
    control.TRAINER, control.MEMBER, control.POSITION = 5, 1, 1
    control.PUSH_SECONDS = 3.0
    return control._run_fault(fault, folder)
