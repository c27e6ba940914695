"""NCCL of the null GPU blocks streams as NCCL does, and circles of waits are named."""

import json
import os
import signal
import subprocess
import sys

import pytest
from waiting import wait_until

from megatron_r1.push.matching.rounds import NO_BUCKET, ProcessLink, RoundSchedule
from megatron_r1.push.transports.nccl_communicator import push_config
from tools.bench.push.stream_operations import BucketTransfer, Step, link_threads
from tools.null_gpu import launch, segment_records, watch
from tools.null_gpu.segment_records import read
from tools.null_gpu.wait_graph import abandoned_calls, find_cycle

INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS = 4, 5, 6, 7


def started(segment) -> list[segment_records.Call]:
    return [call for one in read(segment) for call in one.calls if call.has_started]


@pytest.mark.parametrize("buffered", [0, 2])
def test_a_send_ends_when_it_is_received_or_buffered(start, buffered):
    variables = {"NULL_GPU_NCCL_BUFFERED": str(buffered)}
    sender, receiver = (start("one_way", rank, 3, buffered, **variables) for rank in range(2))
    # As many as may be buffered have ended by now, the others not.
    assert sender.says() is False
    sender.go_on()
    assert sender.says() is False
    receiver.go_on()
    assert sender.says() == "0123"
    assert receiver.says() == "012-"
    assert [sender.ends(), receiver.ends()] == [0, 0]


def four(start, order: str, **variables: str) -> list:
    programs = [start("four_links", order, rank, **variables) for rank in range(4)]
    assert [program.says() for program in programs] == ["issued"] * 4
    return programs


def test_links_in_crossed_orders_on_one_stream_hang_and_the_circle_is_named(start, segment):
    programs = four(start, "crossed")
    wait_until(lambda: find_cycle(segment))
    cycle = find_cycle(segment)
    assert not cycle.through_host and len(cycle.links) == 4
    assert {link.gpu for link in cycle.links} == {0, 1, 2, 3}
    assert len({link.comm for link in cycle.links}) == 4
    named = str(cycle)
    for link in cycle.links:
        assert f"{link.comm:016x}" in named and str(link.pid) in named
    for program in programs:
        program.go_on()
    assert [program.says() for program in programs] == [False] * 4
    for program in programs:
        program.go_on()
    # All abort: nothing has moved, and the streams go on.
    assert [program.says() for program in programs] == ["00", "11", "22", "33"]
    assert [program.ends() for program in programs] == [0] * 4


@pytest.mark.parametrize(("order", "buffered"), [("common", 0), ("crossed", 1)])
def test_links_in_a_common_order_or_buffered_do_not(start, segment, order, buffered):
    programs = four(start, order, NULL_GPU_NCCL_BUFFERED=str(buffered))
    wait_until(lambda: not any(one.calls for one in read(segment)))
    for program in programs:
        program.go_on()
    assert [program.says() for program in programs] == [True] * 4
    for program in programs:
        program.go_on()
    received = ["01", "01"] if order == "common" else ["10", "01"]
    assert [program.says() for program in programs[2:]] == received


PUSH = RoundSchedule(
    [ProcessLink(rank, engine, 16) for rank in (0, 1) for engine in (2, 3)], scatter_bucket_bytes=1
)
"""Two trainer ranks send 16 buckets to each of two engine ranks."""


def in_rounds() -> dict[int, list[Step]]:
    """Return the steps of the push in its planned order."""
    found = {}
    for process in range(PUSH.num_processes):
        found[process] = []
        for _, to, sent, source, received in PUSH.rounds_of(process).tolist():
            calls = [BucketTransfer(True, to, sent), BucketTransfer(False, source, received)]
            calls = [each for each in calls if each.bucket != NO_BUCKET]
            found[process].append(Step(starts=calls, waits=calls))
    return found


@pytest.mark.parametrize("buffered", [0, 2])
@pytest.mark.parametrize("order", ["link_threads", "in_rounds"])
def test_a_thread_for_each_link_hangs_and_rounds_do_not(start, segment, order, buffered):
    """The order in which pushes once ran, as its threads came: sends and receives of all links
    through the one default stream of a process."""
    steps = in_rounds() if order == "in_rounds" else link_threads(PUSH, seed=1, interleaved=4)
    number = str(buffered)
    program = start("ranks_of_a_push", json.dumps(steps), NULL_GPU_NCCL_BUFFERED=number)
    assert program.says() == "enqueued"
    wait_until(lambda: find_cycle(segment) or not any(one.calls for one in read(segment)))
    cycle = find_cycle(segment)

    def have_ended() -> list[bool]:
        program.go_on()
        return program.says()

    if order == "in_rounds":
        assert cycle is None
        wait_until(lambda: have_ended() == [True] * 4)
        return
    assert have_ended() == [False] * 4 and not cycle.through_host
    # The links of the circle: from a trainer rank's GPU, 0 or 1, to an engine rank's.
    assert len({link.comm for link in cycle.links}) == len(cycle.links) == 4
    assert all(link.is_send == (link.gpu < 2) for link in cycle.links)
    for link in cycle.links:
        assert f"rank {link.rank} of {link.comm:016x} (GPU {link.gpu}" in str(cycle)


def test_a_groups_calls_progress_together(start):
    programs = [start("both_ways", rank, "grouped") for rank in range(2)]
    for program in programs:
        assert program.says() == "issued"
        program.go_on()
    assert [program.says() for program in programs] == ["1", "0"]


def test_without_a_group_they_wait_for_each_other(start, segment):
    programs = [start("both_ways", rank, "apart") for rank in range(2)]
    for program in programs:
        assert program.says() == "issued"
    wait_until(lambda: find_cycle(segment))
    found = {(link.rank, link.peer, link.is_send) for link in find_cycle(segment).links}
    assert found == {(0, 1, True), (1, 0, True)}


def test_a_circle_through_events_is_named(start, segment):
    programs = [start("circle_of_events", rank) for rank in range(2)]
    assert [program.says() for program in programs] == ["issued"] * 2
    wait_until(lambda: find_cycle(segment))
    cycle = find_cycle(segment)
    assert not cycle.through_host
    assert {(link.rank, link.is_send) for link in cycle.links} == {(0, False), (1, False)}


def test_a_circle_through_waits_of_hosts_is_named_as_such(start, segment):
    programs = [start("circle_of_hosts", rank) for rank in range(2)]
    wait_until(lambda: find_cycle(segment))
    cycle = find_cycle(segment)
    assert cycle.through_host
    pids = {program.process.pid for program in programs}
    assert {link.pid for link in cycle.links if isinstance(link, segment_records.Wait)} == pids
    assert {link.rank for link in cycle.links if isinstance(link, segment_records.Call)} == {0, 1}


def test_the_watch_ends_with_the_circle_and_names_it(start, segment):
    programs = [start("circle_of_events", rank) for rank in range(2)]
    assert [program.says() for program in programs] == ["issued"] * 2
    command = [sys.executable, watch.__file__, str(segment)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("rank 0 of") == 1


def test_a_rehearsal_names_it_once_within_a_minute_and_says_what_was_held(
    start, segment, monkeypatch, capfd
):
    """`tools/null_gpu` looks each second."""
    programs = [start("circle_of_events", rank) for rank in range(2)]
    assert [program.says() for program in programs] == ["issued"] * 2
    wait_until(lambda: find_cycle(segment))
    watched = launch.Watched(segment)
    monkeypatch.setattr(launch.time, "monotonic", lambda: now)
    named = []
    for now in range(1, 61):
        watched.look(os.getpid())
        named += [now] * capfd.readouterr().err.count("wait for each other in a circle")
    assert len(named) == 1 and 30 <= named[0] < 60
    most = max(watched.of_gpu.values()) / 2**30  # contexts of 512 MiB, and communicators
    assert most > 0.5 and watched.of_host > 0
    assert f"at most {most:.2f} of 80 GiB of a GPU" in watched.summary(80)


def test_a_communicators_calls_run_in_the_order_of_issue(start, segment):
    sender, receiver = (start("order_of_a_communicator", rank) for rank in range(2))
    assert [sender.says(), receiver.says()] == ["issued", "issued"]
    wait_until(lambda: [call.is_send for call in started(segment)] == [False])
    sender.go_on()
    assert sender.says() == [False, False]
    assert [sender.says(), receiver.says()] == ["ab", "ab"]


def test_an_abort_from_another_thread_ends_a_call(start, segment, tmp_path):
    counters = {"NULL_GPU_COUNTERS": str(tmp_path / "counters")}
    sender, other = (start("abort", rank, "aborted", **counters) for rank in range(2))
    assert [other.says(), sender.says()] == ["joined", "issued"]
    wait_until(lambda: started(segment))
    sender.go_on()
    assert sender.says() == [False, True, 0]
    assert sender.says() == [True, "ax"]
    assert sender.ends() == 0
    counted = json.loads((tmp_path / f"counters.{sender.process.pid}.json").read_text())
    assert [row["gpu"] for row in counted["blocked_seconds"]] == [0]


@pytest.mark.parametrize("silent", ["0", "1"])
def test_a_killed_peer_ends_no_call(start, segment, silent):
    how = "aborted" if silent == "1" else "reported"
    sender, other = (start("abort", rank, how, NULL_GPU_SILENT_DEATH=silent) for rank in range(2))
    assert [other.says(), sender.says()] == ["joined", "issued"]
    wait_until(lambda: started(segment))
    other.process.send_signal(signal.SIGKILL)
    wait_until(lambda: abandoned_calls(read(segment)))
    (call,) = abandoned_calls(read(segment))
    assert (call.rank, call.peer, call.pid) == (0, 1, sender.process.pid)
    sender.go_on()
    assert sender.says() == [False, True, 0 if silent == "1" else REMOTE_ERROR]
    assert sender.says() == [True, "ax"]


def test_a_communicator_is_made_when_all_ranks_have_come(start, segment):
    first = start("create", 2, 0, 0)
    assert first.says() == "begins"
    wait_until(lambda: [w.kind for one in read(segment) for w in one.waits] == ["creation"])
    second = start("create", 2, 1, 1)
    assert [second.says(), second.says(), first.says()] == ["begins", 0, 0]


def test_making_one_without_blocking_can_be_aborted(start, segment):
    program = start("create_without_blocking")
    assert program.says() == [IN_PROGRESS, IN_PROGRESS, INVALID_USAGE]
    wait_until(lambda: [w.kind for one in read(segment) for w in one.waits] == ["creation"])
    program.go_on()
    assert program.says() == "aborted"
    wait_until(lambda: not any(one.waits for one in read(segment)))


def test_the_configuration_of_a_push_is_checked_as_nccl_does_and_communicators_are_counted(
    start, tmp_path
):
    def changed(**fields: int) -> str:
        config = push_config()
        for name, value in {"blocking": 1, "commName": None, **fields}.items():
            setattr(config, name, value)
        return bytes(config).hex()

    refused = ({"magic": 1}, {"blocking": 2}, {"minCTAs": 9}, {"nChannelsPerNetPeer": 0})
    # NCCL 2.26 did not have this one, and 2.16 neither of the channels.
    taken = ({}, {"nChannelsPerNetPeer": 0, "version": 22600}, {"maxCTAs": 0, "version": 21600})
    counters = {"NULL_GPU_COUNTERS": str(tmp_path / "counters")}
    program = start("configured", *(changed(**one) for one in (*taken, *refused)), **counters)
    assert program.says() == [0] * len(taken) + [INVALID_ARGUMENT] * len(refused)
    assert program.ends() == 0
    counted = json.loads((tmp_path / f"counters.{program.process.pid}.json").read_text())
    assert [(c["size"], c["calls"]) for c in counted["communicators"]] == [(1, 1), *[(1, 0)] * 3]


def test_two_ranks_on_one_gpu_are_refused(start):
    programs = [start("create", 2, rank, 3) for rank in range(2)]
    assert [program.says() for program in programs] == ["begins"] * 2
    assert [program.says() for program in programs] == [INVALID_USAGE] * 2


def test_collectives_of_three_ranks(start):
    programs = [start("collectives", rank, 3) for rank in range(3)]
    for rank, program in enumerate(programs):
        reduced, gathered, root, scattered = program.says()
        # Sum, product, maximum, minimum, average of rank and rank + 0.5; a group of two sums.
        *single, grouped = reduced
        assert single == [[3, 4.5], [0, 1.875], [2, 2.5], [0, 0.5], [1, 1.5]]
        assert grouped == [3, 3, 3]
        assert gathered == [0, 0.5, 1, 1.5, 2, 2.5]
        assert root == [1] and scattered == [3 * gathered[rank]]


def test_a_disagreement_is_an_error_of_the_communicator_and_ends_no_call(start):
    programs = [start("disagree", rank) for rank in range(2)]
    assert [program.says() for program in programs] == [[INVALID_USAGE, False]] * 2
    assert [program.ends() for program in programs] == [0, 0]
