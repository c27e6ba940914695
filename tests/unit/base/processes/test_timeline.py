"""Spans that a process records."""

import asyncio
import json
import os

import pytest

from megatron_r1.base.processes import timeline


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(timeline.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(timeline, "FLUSH_SECONDS", 0.0)
    timeline._process_writer.cache_clear()
    yield tmp_path
    timeline._process_writer.cache_clear()


def _names(folder, pid=None):
    lines = (folder / f"{pid or os.getpid()}.jsonl").read_text().splitlines()
    return [json.loads(line)[0] for line in lines]


def test_nothing_is_recorded_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv(timeline.FOLDER_VARIABLE, raising=False)
    timeline._process_writer.cache_clear()
    with timeline.span("controller/work"):
        pass
    timeline.begin_step(1)
    assert not timeline.is_on() and not list(tmp_path.iterdir())


def test_spans_and_steps_are_lines_with_their_times(folder):
    timeline.begin_step(3)
    with timeline.span("controller/work"):
        pass
    assert timeline.timed("controller/call")(lambda a, b: a + b)(1, b=2) == 3
    lines = [
        json.loads(line) for line in (folder / f"{os.getpid()}.jsonl").read_text().splitlines()
    ]
    spans = [line for line in lines if line[0] != timeline.CPU_KIND]
    assert [line[0] for line in spans] == ["step/3", "controller/work", "controller/call"]
    times = [time for line in spans for time in line[1:]]
    assert times == sorted(times)


def test_a_forked_child_has_a_file_of_its_own(folder):
    with timeline.span("controller/before"):
        pass
    pid = os.fork()
    if pid == 0:
        with timeline.span("core/after"):
            pass
        os._exit(0)
    os.waitpid(pid, 0)
    assert "core/after" in _names(folder, pid) and "core/after" not in _names(folder)


def test_waiting_of_an_event_loop_is_recorded(folder, monkeypatch):
    # On a busy machine the time to sleep is over before the loop begins to wait.
    monkeypatch.setattr(timeline, "SHORTEST_IDLE", 0.0)

    async def wait() -> None:
        timeline.watch_waiting(asyncio.get_running_loop())
        await asyncio.sleep(0.001)

    asyncio.run(wait())
    assert timeline.IDLE_SPAN in _names(folder)
