"""The order of a push in rounds, against what every process must send and receive."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from megatron_r1.push.matching.planned_links import colocated_trainer_ranks
from megatron_r1.push.matching.rounds import (
    NO_BUCKET,
    ProcessLink,
    RoundSchedule,
    receiving_processes,
)

SIZES = {"scatter_bucket_bytes": 10, "relay_bucket_bytes": 15}
"""Of buckets here."""


def random_order(seed: int, *, colocated: bool) -> RoundSchedule:
    """Return the order of a push from random trainer ranks to sets of engines, not all equal."""
    rng = np.random.default_rng(seed)
    world_size, engines, ranks = (int(n) for n in rng.integers(1, [9, 6, 4]))
    sets = [range(engines // 2), range(engines // 2, engines)] if engines > 3 else [range(engines)]
    shared = colocated_trainer_ranks(sets, ranks, world_size) if colocated else {}
    receivers = receiving_processes(sets, ranks, world_size, shared)
    into = [process for of_set in receivers for members in of_set for process in members]
    links = [
        ProcessLink(int(sender), process, int(rng.integers(1, 200)))
        for process in into
        for sender in rng.choice(world_size, int(rng.integers(1, world_size + 1)), replace=False)
    ]
    positions = [members for of_set in receivers for members in of_set if len(members) > 1]
    return RoundSchedule(links, positions, **SIZES)


@pytest.fixture(params=[(seed, colocated) for seed in range(12) for colocated in (True, False)])
def order(request):
    seed, colocated = request.param
    return random_order(seed, colocated=colocated)


def rows_by_round(order):
    rounds = defaultdict(dict)
    for process in range(order.num_processes):
        for number, *row in order.rounds_of(process).tolist():
            assert process not in rounds[number], "two groups of a process in a round"
            rounds[number][process] = row
    return rounds


def test_both_sides_of_each_transfer_are_in_one_round(order):
    rounds = rows_by_round(order)
    assert set(rounds) <= set(range(order.num_scatter_rounds + order.num_relay_rounds))
    for rows in rounds.values():
        for process, (to, sent, source, received) in rows.items():
            assert (sent, received) != (NO_BUCKET, NO_BUCKET)
            if sent != NO_BUCKET:
                assert rows[to][2:] == [process, sent] and order.bucket_senders[sent] == process
            if received != NO_BUCKET:
                assert rows[source][:2] == [process, received]


def test_every_process_of_a_position_ends_with_all_that_entered_one_and_nothing_twice(order):
    bytes_of = Counter()
    for process in range(order.num_processes):
        rows = order.rounds_of(process)
        received = rows["received_bucket"][rows["received_bucket"] != NO_BUCKET]
        assert len(set(received.tolist())) == len(received)
        copied = (order.receivers == process) & (order.scatter_rounds == NO_BUCKET)
        assert (order.senders[copied] == process).all()
        bytes_of[process] = order.num_bytes[received].sum()
        bytes_of[process] += order.num_bytes[: order.num_scatter_buckets][copied].sum()
    entered = Counter()
    for link in order.links:
        entered[link.receiver] += link.num_bytes
    together = {process: members for members in order.relay_groups for process in members}
    for process in entered:
        members = together.get(process, [process])
        assert bytes_of[process] == sum(entered[member] for member in members)


def test_nothing_is_passed_on_before_all_has_entered(order):
    for process in range(order.num_processes):
        rows = order.rounds_of(process)
        assert (np.diff(rows["round"]) > 0).all()
        relayed = rows["sent_bucket"] >= order.num_scatter_buckets
        entering = (rows["received_bucket"] != NO_BUCKET) & (
            rows["received_bucket"] < order.num_scatter_buckets
        )
        if relayed.any() and entering.any():
            assert rows["round"][entering].max() < rows["round"][relayed].min()


def test_buckets_are_equal_parts_of_limited_size(order):
    first = 0
    for link, count in zip(order.links, order.link_buckets.tolist(), strict=True):
        sizes = order.num_bytes[first : first + count]
        first += count
        assert sizes.sum() == link.num_bytes and np.ptp(sizes) <= 1
        assert sizes.max() <= SIZES["scatter_bucket_bytes"] and count == -(-link.num_bytes // 10)
    assert order.num_bytes[first:].max(initial=0) <= SIZES["relay_bucket_bytes"]


def test_the_rounds_of_entry_are_few(order):
    """At least as many as the busiest process has buckets; Koenig's theorem says that this many
    suffice, and matchings of the busiest come near."""
    assert order.min_scatter_rounds <= order.num_scatter_rounds <= order.min_scatter_rounds + 1


def test_an_order_that_is_known_by_hand():
    """Two trainer ranks and two engines of one rank, processes 2 and 3: rank 0 has two buckets for
    either engine, rank 1 one for the first."""
    order = RoundSchedule(
        [ProcessLink(0, 2, 20), ProcessLink(0, 3, 20), ProcessLink(1, 2, 10)], [[2, 3]], **SIZES
    )
    assert order.num_scatter_rounds == order.min_scatter_rounds == 4
    assert order.num_bytes.tolist() == [10] * 5 + [15, 15, 10, 10]
    assert sorted(order.scatter_rounds[:4].tolist()) == [0, 1, 2, 3]
    relayed = order.rounds_of(2)[-2:]
    assert relayed.tolist() == [(4, 3, 5, 3, 7), (5, 3, 6, 3, 8)]
    assert order.num_relay_rounds == 2


def test_what_a_process_sends_to_itself_takes_no_round():
    """Three and one bucket, 0 to 3; each relays two, 4 and 5, 6 and 7."""
    order = RoundSchedule([ProcessLink(0, 0, 30), ProcessLink(1, 1, 5)], [[0, 1]], **SIZES)
    assert order.num_scatter_rounds == order.min_scatter_rounds == 0
    assert order.rounds_of(0).tolist() == [(0, 1, 4, 1, 6), (1, 1, 5, 1, 7)]
    assert order.num_bytes[4:].tolist() == [15, 15, 2, 3]
