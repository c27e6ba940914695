"""A rank that keeps others waiting is named."""

import threading

import pytest
import torch.distributed as dist
from waiting import PATIENT

from megatron_r1.rehearse.preflight import rank_progress
from megatron_r1.rehearse.preflight.rank_progress import RankProgress


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(rank_progress, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(rank_progress, "STAGGER_SECONDS", 0.2)


class Ranks:
    """Three ranks in one process. ended: what each would have printed."""

    def __init__(self, limit_seconds: float):
        store, self.ended = dist.HashStore(), {}
        self.over = threading.Event()
        self.all = [
            RankProgress(lambda: store, rank, f"host-{rank}", 3, limit_seconds, self._ender(rank))
            for rank in range(3)
        ]

    def _ender(self, rank):
        def end(message):
            self.ended[rank] = message
            if message:
                self.over.set()

        return end

    def diagnosis(self) -> str:
        self.over.wait()
        for each in self.all:
            if each._thread.is_alive():
                each._end_event.set()
                each._thread.join()
        (message,) = filter(None, self.ended.values())
        return message


def test_a_rank_that_is_behind_is_named():
    ranks = Ranks(0.2)
    for number, each in enumerate(ranks.all):
        each.start()
        each.begin_step("join")
        if number != 2:
            each.begin_step("all-reduce over data")
    assert ranks.diagnosis() == (
        "rank 2 on host-2 is still in 'join'. The others wait in 'all-reduce over data'. Replace "
        "that host, or look at it"
    )


def test_a_process_that_has_stopped_is_named_though_it_is_in_the_same_step():
    ranks = Ranks(0.2)
    for number, each in enumerate(ranks.all):
        if number != 1:
            each.start()
        each.begin_step("all-reduce over data")
    assert ranks.diagnosis().startswith("rank 1 on host-1 has stopped in 'all-reduce over data'.")


def test_a_process_that_never_came_is_named():
    ranks = Ranks(0.2)
    for each in ranks.all[:2]:
        each.start()
        each.begin_step("join")
    assert ranks.diagnosis().startswith("rank 2 has not started. The others wait in 'join'.")


def test_where_all_hang_alike_the_network_is_named():
    ranks = Ranks(0.2)
    for each in ranks.all:
        each.start()
        each.begin_step("all-reduce over data")
    assert ranks.diagnosis().startswith("all ranks hang in 'all-reduce over data'")


def test_ranks_that_meet_and_go_on_end_without_a_diagnosis():
    ranks = Ranks(PATIENT)

    def run(each):
        each.start()
        each.begin_step("first")
        each.barrier("here")
        each.begin_step("second", 2.0)
        each.close()

    threads = [threading.Thread(target=run, args=(each,)) for each in ranks.all]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not ranks.ended and all(e.seconds.keys() == {"first", "second"} for e in ranks.all)
