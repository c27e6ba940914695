"""The end of children: what they have started ends too, and nothing else."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from liveness import is_alive, wait_until_dead
from r1_grading.base.workers import FramedProcess

from megatron_r1.base.processes import children
from megatron_r1.engines.server.server import EngineServer

HOLDER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    held = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
for line in sys.stdin:
    print("lives", flush=True)
"""


@pytest.fixture
def shared():
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        yield Path(file.name)


@pytest.fixture
def other(shared):
    """A process with a session of its own and shared memory, which is not to be touched."""
    command = [sys.executable, "-c", HOLDER, shared]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        process.stdout.readline()
        yield process
        process.kill()


def ended_child():
    child = subprocess.Popen(["true"], start_new_session=True)
    child.wait()
    return child


def end_framed(child):
    async def story():
        tail = SimpleNamespace(task=asyncio.create_task(asyncio.sleep(0)))

        async def wait():
            return child.returncode

        transport = SimpleNamespace(close=lambda: None)
        process = SimpleNamespace(pid=child.pid, returncode=0, wait=wait, _transport=transport)
        await FramedProcess._end_process(SimpleNamespace(process=process, _stderr=tail))

    asyncio.run(story())


def end_engine(child):
    settings = SimpleNamespace(device="cpu")
    started = {"process": child, "settings": settings, "_scratch": None, "_port_holder": None}
    EngineServer.stop(SimpleNamespace(**started))


@pytest.mark.parametrize("end", [children.stop, children.kill, end_framed, end_engine])
def test_a_process_that_got_the_number_of_an_ended_child_is_not_touched(end, other, shared):
    child = ended_child()
    child.pid = other.pid  # as after the numbers have gone round once
    end(child)
    with contextlib.suppress(BrokenPipeError):
        other.stdin.write(b"?\n")
        other.stdin.flush()
    assert other.stdout.readline() == b"lives\n"
    assert shared.exists()


def test_what_an_ended_child_has_left_in_its_group_is_killed():
    starts_another = "import subprocess; print(subprocess.Popen(['sleep', '9999']).pid, flush=True)"
    command = [sys.executable, "-c", starts_another]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        left = int(child.stdout.readline())
        child.wait()
        assert is_alive(left)
        children.stop(child)
    assert wait_until_dead(left)
