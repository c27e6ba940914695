"""The simulation of pushes against cases that are solved by hand."""

import pytest

from megatron_r1.push.matching import EngineLayout, MatchedRegions, TrainerGrid
from megatron_r1.push.matching.rounds import ProcessLink, RoundSchedule
from tests.unit.push.push_models import DEEPSEEK_MTP, QWEN
from tools.bench.push.scale import (
    PushAssumptions,
    ScaleCase,
    missed_aims,
    simulate_case,
    transfer_seconds,
    without_order,
)
from tools.bench.push.stream_operations import (
    BucketTransfer,
    Step,
    operations_of_rounds,
    operations_of_steps,
)
from tools.bench.push.stream_queues import StreamQueues

EXACT = {"nic": 1.0, "nic_efficiency": 1.0, "nvlink": 10.0, "nvlink_efficiency": 1.0}
FREE = PushAssumptions(
    **EXACT, device_pack=100.0, message_seconds=0, round_seconds=0, hop_seconds=0, gpus_per_node=1
)


def seconds_of(order: RoundSchedule, rates: PushAssumptions = FREE) -> float:
    operations = operations_of_rounds(order)
    ended = StreamQueues(operations, transfer_seconds(order, operations, rates)).run()
    assert ended.num_stuck == 0
    return ended.seconds


@pytest.mark.parametrize("engines", [2, 4])
def test_what_enters_is_passed_on_in_as_many_rounds_as_there_are_others(engines):
    """Each of E engines of one rank receives 6 bytes at 1 B/s, then passes them on E - 1 times.

    That takes 6 E seconds, as if the trainer had sent everything to every engine."""
    links = [ProcessLink(rank, engines + rank, 6) for rank in range(engines)]
    positions = [range(engines, 2 * engines)]
    assert seconds_of(RoundSchedule(links, positions, 3, 2)) == pytest.approx(6 * engines)


def test_a_process_sends_one_bucket_at_a_time():
    assert (
        seconds_of(
            RoundSchedule([ProcessLink(0, 1, 4), ProcessLink(0, 2, 4)], scatter_bucket_bytes=2)
        )
        == 8
    )


def test_a_process_sends_and_receives_at_once():
    assert (
        seconds_of(
            RoundSchedule([ProcessLink(0, 1, 4), ProcessLink(1, 0, 4)], scatter_bucket_bytes=2)
        )
        == 4
    )


def test_within_a_node_bytes_pass_nvlink_and_each_message_has_its_latency():
    rates = PushAssumptions(**EXACT, device_pack=100.0, message_seconds=0.5, gpus_per_node=2)
    for receiver, seconds in ((1, 2 * (0.5 + 0.1)), (2, 2 * (0.5 + 1.0))):
        order = RoundSchedule([ProcessLink(0, receiver, 2)], scatter_bucket_bytes=1)
        assert seconds_of(order, rates) == pytest.approx(seconds)


def posts_first(sends: bool) -> list[Step]:
    """Return the steps of a process that posts two buckets of its peer, and then waits for both."""
    calls = [BucketTransfer(sends, int(sends), bucket) for bucket in (0, 1)]
    return [Step(starts=calls), Step(waits=calls)]


@pytest.mark.parametrize(("buffered", "stuck"), [(0, 2), (1, 2), (2, 1)])
def test_a_send_ends_without_its_receive_if_it_is_buffered(buffered, stuck):
    """Process 0 sends two buckets to process 1, which waits for a third process before that."""
    steps = {
        0: posts_first(True),
        1: [
            Step(starts=[BucketTransfer(False, 2, 2)], waits=[BucketTransfer(False, 2, 2)]),
            Step(starts=[BucketTransfer(False, 0, 0), BucketTransfer(False, 0, 1)]),
        ],
    }
    queues = StreamQueues(operations_of_steps(steps))
    assert [queues.run(seed, buffered).num_stuck for seed in range(5)] == [stuck] * 5


def test_an_order_whose_streams_wait_for_each_other_sticks_unless_buffered():
    """Two processes that send before they receive."""
    steps = {
        process: [
            Step(starts=[call], waits=[call])
            for call in (
                BucketTransfer(True, 1 - process, process),
                BucketTransfer(False, 1 - process, 1 - process),
            )
        ]
        for process in (0, 1)
    }
    queues = StreamQueues(operations_of_steps(steps))
    assert queues.run().num_stuck == 2 and queues.run(buffered=1).num_stuck == 0


def small_case(**changes) -> ScaleCase:
    grid, engines = TrainerGrid(16, pipeline=2, expert=4), EngineLayout(8, tensor_parallel=2)
    matched_regions = MatchedRegions(DEEPSEEK_MTP, grid, engines)
    return ScaleCase("small", matched_regions, **{"colocated": False, **changes})


@pytest.mark.parametrize("colocated", [True, False])
@pytest.mark.parametrize("form", ["bf16", "FP8"])
def test_rounds_are_simulated_within_all_aims(colocated, form):
    row = simulate_case(small_case(colocated=colocated, form=form), FREE)
    assert row["circle"] is None and row["processes that stick"] == 0
    assert row["processes"] == (16 if colocated else 32)
    assert 0 <= row["rounds of entry"] - row["floor of rounds"] <= 1
    assert row["seconds of entry"] < row["seconds"]


@pytest.mark.parametrize(("tensor", "held"), [(2, 1.0), (1, 0.5)])
def test_what_an_engine_rank_s_own_gpu_holds_is_counted(tensor, held):
    """Trainer and engine of two tensor ranks each, of which the ranks on a GPU hold the same half.

    Or a trainer of two stages, of which each holds a part of what both engine ranks need."""
    grid = TrainerGrid(2, tensor=tensor, pipeline=2 // tensor)
    matched_regions = MatchedRegions(QWEN, grid, EngineLayout(1, tensor_parallel=2))
    row = simulate_case(ScaleCase("two GPUs", matched_regions, colocated=True), FREE)
    assert row["held on its own GPU"] == pytest.approx(held, abs=0.1)


def test_a_push_without_a_common_order_is_named():
    """Each trainer rank has a link to several engine ranks, whose threads enqueue as they come."""
    found = without_order(small_case())
    (stuck,) = (value for key, value in found.items() if key.startswith("processes that stick"))
    assert len(stuck) == 5 and stuck[0] > 0
    assert found["circle"]


def test_figures_beyond_their_aims_are_named():
    row = {"over the floor": 1.19, "links into a rank": 5, "processes that stick": 0}
    assert missed_aims({**row, "links out of a rank": 32}) == []
    worse = {"links out of a rank": 976, "processes that stick": 4096, "over the floor": 6.07}
    named = missed_aims({**row, **worse})
    assert [any(number in text for text in named) for number in ("976", "4096", "6.07")] == [
        True
    ] * 3
