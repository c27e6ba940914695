"""The checker of orders: it accepts rounds, and agrees with a model of stream queues on others."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.config import load_recipe
from megatron_r1.models import read_hf_config
from megatron_r1.models.weights.layout import recipe_stages
from megatron_r1.push.matching import EngineLayout, MatchedRegions, TrainerGrid
from megatron_r1.push.matching.planned_links import (
    MAX_SET_ENGINES,
    colocated_trainer_ranks,
    engine_sets,
    plan_sets,
)
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.recipe_plan import engine_layout
from megatron_r1.push.matching.rounds import (
    ProcessLink,
    RoundSchedule,
    receiving_processes,
    schedule_rounds,
)
from megatron_r1.push.matching.tensors import fp8_bytes, plain_bytes
from tools.bench.push.schedule_check import Fault, find_fault
from tools.bench.push.stream_operations import (
    BucketTransfer,
    Step,
    link_threads,
    operations_of_rounds,
    operations_of_steps,
)
from tools.bench.push.stream_queues import StreamQueues

ROOT = Path(__file__).parents[3]
OVER_NCCL = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if "transport: nccl" in path.read_text(encoding="utf-8")
]


def order_of(trainers: int, engines: int, num_bytes: int = 40, *, colocated=False) -> RoundSchedule:
    """Return the order of a push in which every trainer rank sends to every engine of one rank."""
    first = 0 if colocated else trainers
    members = [first + engine for engine in range(engines)]
    links = [ProcessLink(rank, member, num_bytes) for rank in range(trainers) for member in members]
    return RoundSchedule(links, [members], scatter_bucket_bytes=10, relay_bucket_bytes=15)


@cache
def pushes(
    model: str, grid: TrainerGrid, engines: EngineLayout, stages: tuple, form: str, *, drafts: bool
):
    """Return the orders of one plan, with engines on GPUs of their own and on the trainer's, and
    what the checker says to each."""
    hf_config = read_hf_config(model)
    sharding = PredictedSharding(hf_config, engines, drafts=drafts)
    matched_regions = MatchedRegions(hf_config, grid, engines, stages, sharding)
    sets, ranks = engine_sets(engines.engines, MAX_SET_ENGINES), engines.ranks_per_engine
    plans = plan_sets(matched_regions, fp8_bytes if form == "FP8" else plain_bytes(form), sets)
    orders = [
        schedule_rounds(plans, receiving_processes(sets, ranks, grid.world_size, shared))
        for shared in ({}, colocated_trainer_ranks(sets, ranks, grid.world_size))
    ]
    return [(order, find_fault(operations_of_rounds(order), order)) for order in orders]


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("path", OVER_NCCL, ids=lambda path: path.stem)
def test_the_rounds_of_a_shipped_recipe_are_free_of_circles_and_near_their_floor(path):
    config = load_recipe(path)
    hf_config = read_hf_config(config.model.path)
    grid = TrainerGrid.from_recipe(config.parallel, config.parallel.processes)
    stages = tuple(map(tuple, recipe_stages(config, hf_config)))
    model, form = str(config.model.path), "FP8" if config.push.fp8 else config.rollout.dtype
    drafts = config.rollout.drafts_by_mtp
    for order, refusal in pushes(model, grid, engine_layout(config), stages, form, drafts=drafts):
        assert refusal is None
        assert order.num_scatter_rounds <= 1.1 * order.min_scatter_rounds
        assert order.num_processes in (grid.world_size, 2 * grid.world_size)


@pytest.mark.parametrize("colocated", [True, False])
@pytest.mark.parametrize(("trainers", "engines"), [(1, 1), (3, 2), (4, 4), (5, 7)])
def test_rounds_are_accepted_and_never_stick(trainers, engines, colocated):
    order = order_of(trainers, engines, colocated=colocated)
    operations = operations_of_rounds(order)
    assert find_fault(operations, order) is None
    queues = StreamQueues(operations)
    assert not any(queues.run(seed, seed % 5).num_stuck for seed in range(20))


@pytest.mark.parametrize("interleaved", [0, 4])
def test_a_thread_for_each_link_is_refused_where_it_sticks(interleaved):
    order = order_of(2, 2)
    verdicts = []
    for seed in range(100):
        operations = operations_of_steps(link_threads(order, seed, interleaved))
        refusal = find_fault(operations, order)
        verdicts.append(refusal is not None)
        assert verdicts[-1] == (StreamQueues(operations).run(seed).num_stuck > 0)
        if refusal:
            assert refusal.fault is Fault.CYCLE
            # Each waits on a link for the next of the circle, and the last for the first.
            following = [*refusal.waits[1:], refusal.waits[0]]
            for wait, following_wait in zip(refusal.waits, following, strict=True):
                assert {wait.process, following_wait.process} == {wait.sender, wait.receiver}
                assert order.senders[wait.bucket] == wait.sender
                assert order.receivers[wait.bucket] == wait.receiver
    assert 0 < sum(verdicts) < 100


def test_the_circle_of_four_is_named():
    """Two senders and two receivers, each of which begins with what the other side has last."""
    order = RoundSchedule(
        [ProcessLink(0, 2, 1), ProcessLink(0, 3, 1), ProcessLink(1, 2, 1), ProcessLink(1, 3, 1)]
    )
    to = {link[:2]: number for number, link in enumerate(order.links)}

    def steps(sends, process, peers):
        pairs = [(process, peer) if sends else (peer, process) for peer in peers]
        calls = [
            BucketTransfer(sends, peer, to[pair]) for peer, pair in zip(peers, pairs, strict=True)
        ]
        return [Step(starts=[call], waits=[call]) for call in calls]

    tangled = {
        0: steps(True, 0, (2, 3)),
        1: steps(True, 1, (3, 2)),
        2: steps(False, 2, (1, 0)),
        3: steps(False, 3, (0, 1)),
    }
    refusal = find_fault(operations_of_steps(tangled), order)
    assert refusal.fault is Fault.CYCLE and len(refusal.waits) == 4
    assert {(wait.sender, wait.receiver) for wait in refusal.waits} == set(to)
    # Where the stream of process 0 begins both sends before it waits for either, all ends.
    first, second = tangled[0]
    tangled[0] = [Step(starts=[*first.starts, *second.starts], waits=[*first.waits, *second.waits])]
    assert find_fault(operations_of_steps(tangled), order) is None


@pytest.mark.parametrize(
    ("colocated", "faults"),
    [(True, {Fault.CYCLE, Fault.MISMATCHED}), (False, {Fault.CYCLE, Fault.EARLY})],
)
def test_two_rounds_swapped_in_one_process_are_refused_where_it_sticks(colocated, faults):
    order = order_of(4, 4, colocated=colocated)
    operations, found = operations_of_rounds(order), set()
    for process in range(order.num_processes):
        own = np.flatnonzero(operations["process"] == process)
        for place in range(operations["start"][own].max()):
            swapped = operations.copy()
            rows = swapped[own]
            places = rows["start"].copy()
            rows["start"] += (places == place).astype(np.int32) - (places == place + 1)
            rows["end"] = rows["start"]
            swapped[own] = rows[np.argsort(rows["start"], kind="stable")]
            refusal = find_fault(swapped, order)
            found.add(refusal and refusal.fault)
            if refusal is None or refusal.fault is Fault.CYCLE:
                assert bool(refusal) == (StreamQueues(swapped).run(place).num_stuck > 0)
            if refusal and refusal.fault is Fault.CYCLE:
                assert process in {wait.process for wait in refusal.waits}
    assert found >= faults


@pytest.mark.parametrize("sends", [True, False])
def test_a_call_that_is_left_out_is_named_by_its_other_side(sends):
    order = order_of(3, 2)
    operations = operations_of_rounds(order)
    for row in np.flatnonzero(operations["sends"] == sends):
        left_out = operations[row]
        refusal = find_fault(np.delete(operations, row), order)
        assert refusal.fault is Fault.UNMATCHED
        (wait,) = refusal.waits
        assert {wait.sender, wait.receiver} == {left_out["process"], left_out["peer"]}
        assert wait.process == left_out["peer"]


def test_a_bucket_that_is_passed_on_before_its_parts_have_arrived_is_refused():
    order = order_of(3, 2)
    operations = operations_of_rounds(order)
    entering = operations["bucket"] < order.num_scatter_buckets
    for process in (3, 4):
        own = operations["process"] == process
        early = operations.copy()
        # What it passes on comes before its last arrival; nothing else changes.
        last = operations["start"][own & entering].max()
        early["start"][own & ~entering] -= 1
        early["start"][own & entering & (operations["start"] == last)] += order.num_relay_rounds
        early["end"] = early["start"]
        refusal = find_fault(early, order)
        assert refusal.fault is Fault.EARLY and refusal.waits[0].process == process


def test_a_bucket_that_another_process_has_is_refused():
    order = RoundSchedule([ProcessLink(0, 2, 1), ProcessLink(1, 3, 1)])
    exchanged = {
        0: [Step(starts=[BucketTransfer(True, 2, 1)], waits=[BucketTransfer(True, 2, 1)])],
        2: [Step(starts=[BucketTransfer(False, 0, 1)], waits=[BucketTransfer(False, 0, 1)])],
    }
    refusal = find_fault(operations_of_steps(exchanged), order)
    assert refusal.fault is Fault.EARLY and refusal.waits[0].process == 0
