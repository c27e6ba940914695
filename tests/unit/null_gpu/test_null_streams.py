"""Streams of the null GPU are queues that run apart from the host, as CUDA's."""

import pytest
from waiting import wait_until

from tools.null_gpu.segment_records import read

NOT_READY = 600


def test_what_is_queued_on_a_stream_waits_and_runs_in_order(start):
    held_up, after = start("order_in_a_stream").says()
    assert held_up == ["abcd", "----", False]
    assert after == ["yyxx", "yyxx", True]


def test_streams_are_independent_but_for_events(start):
    independent, queried, memory, milliseconds = start("two_streams").says()
    assert independent == ["ay", False]
    assert queried == [0, NOT_READY, False]
    assert memory == "xx" and milliseconds == 0


def test_an_event_is_waited_for_as_it_was_recorded_last_before(start):
    program = start("an_event_is_waited_for_as_it_was_recorded")
    assert [program.says(), program.says()] == [NOT_READY, 0]


@pytest.mark.parametrize(("queues", "held_up"), [(0, False), (1, True)])
def test_what_waits_in_a_queue_of_the_hardware_holds_up_other_streams(
    start, segment, queues, held_up
):
    program = start("hardware_queues", NULL_GPU_QUEUES=str(queues))
    assert program.says() == "queued"
    if held_up:
        wait_until(lambda: any(one.behind for one in read(segment)))
    program.go_on()
    assert program.says() == (["xb", False] if held_up else ["xz", True])
    assert program.says() == "yz"


def test_the_default_stream_waits_for_blocking_streams_and_they_for_it(start):
    held_up, after = start("default_stream").says()
    # `other` was free until something was queued on the default stream behind the one held up.
    assert held_up == ["wvcd", False, False, True]
    assert after == "wvyz"


@pytest.mark.parametrize("kind", ["stream", "device", "event", "free", "operator", "copy"])
def test_the_host_waits_until_a_queue_is_empty(start, segment, kind):
    program = start("waits_of_the_host", kind)
    assert program.says() == "waits"
    wait_until(lambda: [wait.kind for one in read(segment) for wait in one.waits] == [kind])
    program.go_on()
    assert program.says() == [True, "a"]
    memory, pageable = program.says()
    assert memory == "b" and (pageable == "b") == (kind == "copy")


def test_a_small_copy_takes_pageable_memory_along_and_a_pinned_source_must_stay(start):
    assert start("pageable_sources").says() == "abyy"
