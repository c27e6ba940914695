"""The simulation of pushes against cases that are solved by hand."""

import numpy as np
import pytest
from refusals import raised

from megatron_r1.weight_sync.plan import EngineLayout, Planner, TrainerGrid
from megatron_r1.weight_sync.plan.engine_sets import Entry
from megatron_r1.weight_sync.plan.tensors import plain_bytes
from megatron_r1.weights.layout import stage_shards
from tests.unit.weight_sync.push_models import DEEPSEEK_MTP
from tools.bench.push.assumptions import PushAssumptions
from tools.bench.push.designs import Cluster, entry_tasks
from tools.bench.push.fluid import Tasks
from tools.bench.push.scale import ScaleCase, _rows, beyond

EXACT = {"nic": 1.0, "nic_efficiency": 1.0, "nvlink": 10.0, "nvlink_efficiency": 1.0}
FREE = PushAssumptions(
    **EXACT, device_pack=100.0, message_seconds=0, round_seconds=0, hop_seconds=0, gpus_per_node=1
)


def through(*resources):
    return [(np.array(of_task), 1.0) for of_task in resources]


def test_two_flows_share_a_link_and_the_last_has_it_alone():
    tasks = Tasks()
    tasks.add([0, 1], [1.0, 2.0], through([0, 1], [2, 2]))
    np.testing.assert_allclose(tasks.finish_times(np.ones(3)), [2, 3])


def test_rates_are_max_min_fair():
    """Three flows: two share link 0 (capacity 1), of which one shares link 1 (capacity 3) with the
    third, which so gets 3 - 0.5."""
    tasks = Tasks()
    tasks.add([0, 1, 2], [1.0, 1.0, 5.0], through([0, 0, -1], [-1, 1, 1]))
    np.testing.assert_allclose(tasks.finish_times(np.array([1.0, 3.0])), [2, 2, 2])


def test_a_lane_is_a_queue_and_latency_is_waited_for_each_time():
    tasks = Tasks()
    first = tasks.add([0, 0], [1.0, 1.0], through([0, 0]), latency=0.5)
    last = tasks.add([1], [1.0], through([1]))
    tasks.wait(last, first[1:])
    np.testing.assert_allclose(tasks.finish_times(np.ones(2)), [1.5, 3, 4])


def test_weights_are_bytes_through_a_resource_per_byte_of_the_task():
    tasks = Tasks()
    tasks.add([0], [4.0], [(np.array([0]), 0.5), (np.array([1]), 0.25)])
    np.testing.assert_allclose(tasks.finish_times(np.ones(2)), [2])


def test_tasks_that_wait_for_each_other_are_an_error():
    tasks = Tasks()
    both = tasks.add([0, 1], [1.0, 1.0], through([0, 1]))
    tasks.wait(both, both[::-1])
    with raised(ValueError, 2):
        tasks.finish_times(np.ones(2))


def test_events_in_batches_end_near_the_exact_time():
    tasks, rng = Tasks(), np.random.default_rng(0)
    for _ in range(10):
        target = 100 + rng.integers(0, 50, 100)
        tasks.add(np.arange(100), rng.uniform(0.5, 1.5, 100), through(np.arange(100), target), 0.01)
    exact = tasks.finish_times(np.ones(150)).max()
    assert tasks.finish_times(np.ones(150), batch=0.05).max() == pytest.approx(exact, rel=0.05)


class SizedEntry(Entry):
    """An entry of given bytes."""

    num_bytes = 1.0


@pytest.mark.parametrize("engines", [2, 4])
def test_what_enters_is_passed_on_by_a_ring(engines):
    """Each of E engines of one rank receives 1 byte at 1 B/s, then E - 1 bytes from its neighbor:
    E seconds, as if the trainer had sent everything to every engine."""
    position = [SizedEntry(rank, rank, 0, (), 0.0) for rank in range(engines)]
    cluster = Cluster(engines, engines, colocated=False, rates=FREE)
    tasks = entry_tasks(cluster, [(range(engines), [position])], 1)
    np.testing.assert_allclose(tasks.finish_times(cluster.capacity), [1.0] * engines + [engines])


class ThreeBytes(Entry):
    num_bytes = 3.0


def test_shares_are_padded_to_the_largest():
    """One engine receives 1 byte at 1 B/s, the other 3; then each sends the other 3 bytes."""
    position = [SizedEntry(0, 0, 0, (), 0.0), ThreeBytes(1, 1, 0, (), 0.0)]
    cluster = Cluster(2, 2, colocated=False, rates=FREE)
    ends = entry_tasks(cluster, [(range(2), [position])], 1).finish_times(cluster.capacity)
    np.testing.assert_allclose(ends, [1, 3, 6])


def test_a_sender_of_two_engine_ranks_halves_its_rate():
    plan = [[SizedEntry(0, 0, 0, (), 0.0)], [SizedEntry(0, 0, 1, (), 0.0)]]
    cluster = Cluster(1, 2, colocated=False, rates=FREE)
    ends = entry_tasks(cluster, [(range(1), plan)], 2).finish_times(cluster.capacity)
    np.testing.assert_allclose(ends, [2, 2])


def test_within_a_node_bytes_pass_nvlink_and_within_a_gpu_only_its_memory():
    rates = PushAssumptions(**EXACT, device_pack=100.0, message_seconds=0, gpus_per_node=2)
    cluster = Cluster(4, 4, colocated=True, rates=rates)
    for receiver, seconds in ((0, 0.01), (1, 0.1), (2, 1.0)):
        tasks = Tasks()
        tasks.add([0], [1.0], cluster.route(np.array([0]), np.array([receiver])))
        assert tasks.finish_times(cluster.capacity) == pytest.approx([seconds])


def test_engines_served_one_after_another_are_named():
    """All ranks send to the first engine, whose adapters are the limit while the others wait; in
    sets all engines receive at once."""
    grid, engines = TrainerGrid(16, pipeline=2, expert=4), EngineLayout(8, tensor=2)
    stages = stage_shards(DEEPSEEK_MTP, 2)
    cluster = Cluster(16, 16, colocated=False, rates=FREE)
    case = ScaleCase(
        "small", DEEPSEEK_MTP, stages, Planner(DEEPSEEK_MTP, grid, engines, stages), cluster
    )
    found = {row["design"]: beyond(row) for row in _rows(case, "bf16", plain_bytes("bfloat16"))}
    in_turn, _ = found["each engine in turn"]
    assert in_turn == "3.72 x the floor, at most 1.2 wanted"
    assert found["enters one engine, exchanged"] == []


def test_links_and_set_up_beyond_their_aims_are_named():
    row = {"over the floor": 1.19, "links into a rank": 5}
    assert beyond({**row, "links out of a rank": 976, "setup seconds": 2133.4}) == [
        "976 links out of a trainer rank, at most 32 wanted",
        "2.13e+03 s of set-up, at most 10 wanted",
    ]
