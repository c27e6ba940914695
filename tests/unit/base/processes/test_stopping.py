"""Stop requests: received, acknowledged, and obeyed before long work as well as in it."""

import asyncio
import os
import signal

import pytest

from megatron_r1.base.processes.stopping import StopRequest


def story_with(work):
    """Return whether `work` was completed, and the messages."""

    async def story():
        messages = []
        stop = StopRequest()
        stop.notify = messages.append
        stop.listen()
        return await stop.finished_before_stop(work()), messages

    return asyncio.run(story())


def test_what_takes_long_to_start_is_given_up_and_the_signal_acknowledged():
    ends = []

    async def work():
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(1e5)
        finally:
            ends.append("cleaned up")

    came_to_its_end, messages = story_with(work)
    assert not came_to_its_end and ends == ["cleaned up"]
    assert len(messages) == 1


def test_without_a_request_the_work_ends_by_itself_or_fails():
    async def fails():
        raise ValueError("no engine")

    async def story():
        stop = StopRequest()
        done = await stop.finished_before_stop(asyncio.sleep(0))
        with pytest.raises(ValueError, match="no engine"):
            await stop.finished_before_stop(fails())
        return done

    assert asyncio.run(story())
