"""What every rank runs of a push over NCCL, by a model of communicators and one stream a rank."""

from itertools import groupby

import numpy as np
import pytest

from megatron_r1.push.matching import rounds
from megatron_r1.push.matching.planned_links import PlannedLink, TensorRegion
from megatron_r1.push.push_schedule import PayloadId, PushSchedule

OWN = -1
"""The trainer ranks' own communicator, where the others are those of sets."""


def some_bytes(rng: np.random.Generator) -> TensorRegion:
    return TensorRegion(None, None, int(rng.integers(1, 99)))


def random_sets(seed: int, fraction: float) -> tuple[PushSchedule, int, int]:
    """Return sets of engines, a part `fraction` of whose ranks are on trainer ranks' GPUs, with the
    number of trainer ranks and of ranks of an engine."""
    rng = np.random.default_rng(seed)
    world_size, engines, ranks = (int(n) for n in rng.integers(1, [6, 6, 3]))
    sets = [range(engines // 2), range(engines // 2, engines)] if engines > 2 else [range(engines)]
    places = [
        (index, member, engine_rank)
        for index, of_set in enumerate(sets)
        for member in range(len(of_set))
        for engine_rank in range(ranks)
    ]
    chosen = [place for place in places if rng.random() < fraction][:world_size]
    shared = dict(zip(chosen, rng.permutation(world_size).tolist(), strict=False))
    plans = [
        [
            [
                PlannedLink(int(sender), member, engine_rank, (some_bytes(rng),))
                for member in range(len(of_set))
                for sender in rng.choice(
                    world_size, int(rng.integers(0, world_size + 1)), replace=False
                )
            ]
            for engine_rank in range(ranks)
        ]
        for of_set in sets
    ]
    return PushSchedule(plans, sets, ranks, world_size, shared, 1), world_size, ranks


def groups_of(schedule: PushSchedule, world_size: int, ranks: int) -> dict:
    """Return the groups of calls of every process, in order, each with its communicator, the rank
    in it and calls (is send, peer, payload, number, count)."""
    found = {}
    for rank in range(world_size):
        calls = []
        for call in schedule.transfers(rank):
            index = call.payload_id.engine_set_index
            communicator = index if schedule.communicator_size(index) else OWN
            key = (call.is_relayed, call.round, communicator)
            data = (call.is_send, call.peer, call.payload_id, call.number, call.count)
            calls.append((key, data))
        calls.sort(key=lambda each: each[0])
        found["trainer", rank] = [
            (key[-1], rank, [data for _, data in group])
            for key, group in groupby(calls, key=lambda each: each[0])
        ]
    for index, positions in enumerate(schedule.receivers):
        for engine_rank in range(ranks):
            for member, part in enumerate(schedule.rank_rounds(index, engine_rank)):
                assert (part is None) == (positions[engine_rank][member] < world_size)
                if part is None:
                    continue
                assert (
                    part.num_ranks == schedule.communicator_size(index)
                    and world_size <= part.rank < part.num_ranks
                )
                groups = []
                for pair in [*part.scatter, *part.relay]:
                    calls = [
                        (is_send, call.peer, block_at(index, engine_rank, member, call, is_send))
                        + (call.number, call.count)
                        for is_send, call in zip((True, False), pair, strict=True)
                        if call is not None
                    ]
                    groups.append((index, part.rank, calls))
                found[index, member, engine_rank] = groups
    return found


def block_at(index, engine_rank, member, call, is_send):
    if call.source >= 0:
        return PayloadId(index, member, engine_rank, call.source)
    assert not is_send or call.source == -1 - member
    return PayloadId(index, -1 - call.source, engine_rank, None)


@pytest.fixture(params=[(seed, fraction) for seed in range(8) for fraction in (0.0, 0.5, 1.0)])
def sets(request, monkeypatch):
    monkeypatch.setattr(rounds, "SCATTER_BUCKET_BYTES", 10)
    monkeypatch.setattr(rounds, "RELAY_BUCKET_BYTES", 15)
    return random_sets(*request.param)


def test_all_groups_end_and_every_call_meets_the_one_that_it_is_for(sets):
    groups = groups_of(*sets)
    heads = dict.fromkeys(groups, 0)
    owners = {
        (communicator, rank): process
        for process, of_process in groups.items()
        for communicator, rank, _ in of_process
    }
    met: set[tuple] = set()
    """Calls that have ended of groups that have not."""
    moved = True
    while moved:
        moved = False
        for process, of_process in groups.items():
            if heads[process] == len(of_process):
                continue
            communicator, rank, calls = of_process[heads[process]]
            for call in calls:
                is_send, peer, *data = call
                other = owners[communicator, peer]
                if (process, heads[process], is_send) in met:
                    continue
                if heads[other] == len(groups[other]):
                    continue
                at, peer_rank, answers = groups[other][heads[other]]
                if at == communicator and [not is_send, rank, *data] in map(list, answers):
                    assert peer_rank == peer
                    met |= {(process, heads[process], is_send), (other, heads[other], not is_send)}
        for process, of_process in groups.items():
            if heads[process] < len(of_process):
                calls = of_process[heads[process]][2]
                if all((process, heads[process], call[0]) in met for call in calls):
                    heads[process] += 1
                    moved = True
    assert all(heads[process] == len(of_process) for process, of_process in groups.items())


def test_every_block_arrives_whole_where_it_is_for(sets):
    schedule, world_size, _ = sets
    arrived: dict = {}
    for process, of_process in groups_of(*sets).items():
        for _, _, calls in of_process:
            for is_send, _, payload, number, count in calls:
                if not is_send:
                    arrived.setdefault((process, payload), []).append((number, count))
    for portions in arrived.values():
        assert sorted(portions) == [(n, portions[0][1]) for n in range(portions[0][1])]
    copied = {payload for rank in range(world_size) for payload in schedule.local_copies(rank)}
    entering = {payload for _, payload in arrived if payload.trainer_rank is not None}
    links = {payload for payload in schedule.payload_ids if payload.trainer_rank is not None}
    assert entering | copied == links and not entering & copied
    for index, positions in enumerate(schedule.receivers):
        served = {
            place
            for rank in range(world_size)
            if (place := schedule.colocated_engine_rank(index, rank))
        }
        assert {
            (m, p) for p, ms in enumerate(positions) for m, at in enumerate(ms) if at < world_size
        } == served
