"""Reading in the event loop: what there is, the end, and no wait at the process's own end."""

import asyncio
import os

import pytest

from megatron_r1.base.processes.ready_input import read_when_ready


def test_a_pipe_gives_what_it_has_and_its_end():
    reading, writing = os.pipe()

    async def read():
        first = asyncio.create_task(read_when_ready(reading, 3))
        await asyncio.sleep(0)
        os.write(writing, b"12345")
        os.close(writing)
        return [await first, *[await read_when_ready(reading, 3) for _ in range(2)]]

    assert asyncio.run(read()) == [b"123", b"45", b""]
    os.close(reading)


def test_a_file_is_read_to_its_end(tmp_path):
    (tmp_path / "lines").write_bytes(b"12345")

    async def read(descriptor):
        return [await read_when_ready(descriptor, 3) for _ in range(3)]

    with (tmp_path / "lines").open("rb") as file:
        assert asyncio.run(read(file.fileno())) == [b"123", b"45", b""]


def test_a_silent_pipe_does_not_hold_up_the_end():
    reading, writing = os.pipe()
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(read_when_ready(reading, 3), 0.01))
    os.close(reading)
    os.close(writing)
