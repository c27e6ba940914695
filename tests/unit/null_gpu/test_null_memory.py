"""Memory of the null GPU ends, is shared by processes, and is NaN once it is freed."""

import json
import signal

import pytest
from waiting import wait_until

OUT_OF_MEMORY = 2
GIB = 2**30
SIZES = {"NULL_GPU_BYTES": str(10 * GIB), "NULL_GPU_CONTEXT_BYTES": str(GIB)}


def test_processes_share_a_gpu_and_give_back_what_they_held_when_they_die(start):
    first = start("hold", 6 * GIB, **SIZES)
    assert first.says() == [0, 3 * GIB, 10 * GIB]
    second = start("hold", 4 * GIB, **SIZES)
    assert second.says() == [OUT_OF_MEMORY, 2 * GIB, 10 * GIB]
    first.process.send_signal(signal.SIGKILL)  # and nobody waits for it: it stays a zombie
    wait_until(lambda: _has_room(second))


def _has_room(program) -> bool:
    program.go_on()
    error, left, _ = program.says()
    assert left == (2 if error else 5) * GIB
    return error == 0


def test_another_gpu_is_not_concerned(start):
    first = start("hold", 6 * GIB, **SIZES)
    assert first.says()[0] == 0
    second = start("hold", 6 * GIB, CUDA_VISIBLE_DEVICES="1", **SIZES)
    assert second.says() == [0, 3 * GIB, 10 * GIB]


def test_memory_of_the_driver_is_the_gpus_until_it_is_released_and_unmapped(start):
    found, fresh = start("physical_memory", 6 * GIB, **SIZES).says()
    assert found == [
        [0, 9 * GIB],
        [0, 3 * GIB],  # created
        [OUT_OF_MEMORY, 3 * GIB],  # another
        [0, 3 * GIB],  # reserved
        [0, 3 * GIB],  # mapped
        [0, 3 * GIB],  # released, still mapped
        [0, 9 * GIB],
    ]
    assert fresh == "ffffffff"


def test_freed_memory_reads_as_nan_and_cannot_be_written(start):
    program = start("freed_memory", "read")
    assert [program.says(), program.says()] == ["ff" * 8, "lives"]
    program = start("freed_memory", "write")
    assert program.says() == "ff" * 8
    assert program.ends() == -signal.SIGSEGV


def test_communicators_and_graphs_take_memory(start):
    amounts = {"NULL_GPU_NCCL_BYTES": str(2 * GIB), "NULL_GPU_GRAPH_BYTES": str(3 * GIB)}
    found = start("communicators_take_memory", **SIZES, **amounts).says()
    assert found == [9 * GIB, 7 * GIB, 9 * GIB, 6 * GIB]


def test_waits_of_the_host_are_counted_by_kind_label_and_place(start, tmp_path):
    program = start("counted", NULL_GPU_COUNTERS=str(tmp_path / "counters"))
    assert program.says() == 1  # of what `device_memory` copied
    assert program.says() == 6
    assert program.ends() == 0
    found = json.loads((tmp_path / f"counters.{program.process.pid}.json").read_text())
    rows = {(row["label"], row["kind"]): row["number"] for row in found["waits"]}
    assert rows == {
        ("", "copy"): 1,
        ("first to last", "stream"): 1,
        ("after", "copy"): 2,
        ("after", "device"): 1,
        ("after", "free"): 1,
    }
    assert all(row["place"] for row in found["waits"])
    assert found["pinned_peak_bytes"] == pytest.approx(5000, abs=4096)
    assert found["bytes"][0] == found["peak_bytes"][0] == 2**20 + 512 * 2**20
    assert not found["blocked_seconds"]
