"""Pushes into engines whose experts vLLM's balancer moves, on ranks with vLLM's own state, policy
and exchange (`balanced_ranks.py`)."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.more

PROGRAM = Path(__file__).with_name("balanced_ranks.py")
RANKS = 2


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    store = tmp_path_factory.mktemp("ranks") / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(RANKS), store],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    ended = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, ended
    return [out for out, _ in ended]


def numbers(printed, pattern):
    return [[*map(int, found)] for out in printed for found in re.findall(pattern, out)]


def test_three_pushes_reach_every_copy_wherever_it_has_moved(printed):
    pushes = numbers(printed, r"push (\d): (\d+) wrong, then (\d+)")
    assert len(pushes) == 3 * RANKS
    assert [wrong for _, _, wrong in pushes] == [0] * len(pushes)
    # As a load leaves them: without the move the engine would compute with other experts.
    wrong_before = {push: sum(b for p, b, _ in pushes if p == push) for push in (1, 2, 3)}
    assert wrong_before[1] == 0 and wrong_before[2] > 0 and wrong_before[3] > 0
    assert numbers(printed, r"rearranged: (\d+) wrong") == [[0]] * 3 * RANKS


def test_the_balancer_stops_before_a_load_and_experts_move_after_its_check(printed):
    for out in printed:
        orders = re.findall("in order: (.*)", out)
        assert orders == ["drain wait load check keep free"] * 3 + ["drain wait load check free"]


def test_a_load_that_fails_on_one_rank_fails_on_all_and_none_waits(printed):
    failed, other = (re.search("one rank fails: (.*)", out).group(1) for out in printed[::-1])
    assert failed == "ValueError: a damaged chunk"
    assert other == "RuntimeError: 1 of the engine's 2 ranks failed; their errors are in the log"


def test_a_balancer_whose_thread_has_ended_is_not_waited_for(printed):
    ended, other = (re.search("thread ended: (.*)", out).group(1) for out in printed)
    assert "thread of vLLM's balancer has ended" in ended and "1 of the engine's 2" in other


def test_a_rank_sleeps_when_the_balancer_moves_nothing(monkeypatch):
    from vllm import distributed
    from vllm.v1.worker.gpu_worker import Worker

    from megatron_r1.engines.plugin import expert_placement, patches

    done = []
    monkeypatch.setattr(Worker, "sleep", lambda self, level: done.append(f"sleep {level}"))
    monkeypatch.setattr(distributed, "get_ep_group", lambda: SimpleNamespace(cpu_group="group"))
    monkeypatch.setattr(
        expert_placement, "stop_rebalancing", lambda *balancer: done.append(balancer)
    )
    monkeypatch.setattr(expert_placement, "count_moved_slots", lambda _: 3)
    patches.stop_rebalancing_before_sleep()
    for runner in (SimpleNamespace(eplb_state="balancer"), SimpleNamespace()):
        Worker.sleep(SimpleNamespace(model_runner=runner), level=2)
    assert done == [("balancer", "group"), "sleep 2", "sleep 2"]


def test_an_engine_that_has_slept_begins_with_the_first_placement(printed):
    found = numbers(printed, r"after a sleep: (\d+) wrong, then (\d+)")
    assert [after for _, after in found] == [0] * RANKS and sum(before for before, _ in found) > 0
    assert all("copies [2, 2, 1, 1, 1, 1], counted 0" in out for out in printed)


def test_routers_record_the_models_experts_not_copies(printed):
    assert "returned experts [1, 5]" in printed[0]


def test_loaders_of_mtp_layers_fill_the_copies(printed):
    assert "slots of the drafter [[0], [0, 6]]" in printed[0]
