"""Stop requests: received, acknowledged, and obeyed before long work as well as in it."""

import asyncio
import os
import signal

import pytest

from megatron_r1.processes.stopping import StopRequest


def story_with(work):
    """(whether `work` completed, messages) of a process that gets SIGTERM at once."""

    async def story():
        messages = []
        stop = StopRequest()
        stop.notify = messages.append
        stop.listen()
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
        return await stop.before(work()), messages

    return asyncio.run(asyncio.wait_for(story(), 20))


def test_what_takes_long_to_start_is_given_up_and_the_signal_acknowledged():
    ends = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ends.append("cleaned up")

    came_to_its_end, messages = story_with(work)
    assert not came_to_its_end and ends == ["cleaned up"]
    assert messages == ["stopping when the step in hand is done; once more ends it at once"]


def test_without_a_request_the_work_ends_by_itself_or_fails():
    async def fails():
        raise ValueError("no engine")

    async def story():
        stop = StopRequest()
        done = await stop.before(asyncio.sleep(0))
        with pytest.raises(ValueError, match="no engine"):
            await stop.before(fails())
        return done

    assert asyncio.run(story())
