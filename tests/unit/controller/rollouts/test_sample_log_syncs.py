"""Samples are on disk before a policy is trained on them."""

import asyncio
from array import array

from syncs import recorded_syncs

from megatron_r1.controller.rollouts import sample_log
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response

PROMPT = make_prompt("question", "math", "1", {})


def group():
    response = Response(array("i", [1]), array("f", [-1.0]), array("i", [0]), "stop")
    return Group(PROMPT, [5], [GradedResponse(response, "x", {"accuracy": 1.0}, 1.0, "")])


def test_a_batch_is_synced_before_it_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_log, "SYNC_SECONDS", 1e6)  # not by the timer

    async def run():
        log = SampleLog(tmp_path)
        step = await log.step(1)
        step.append(0, group())
        synced = recorded_syncs(monkeypatch)
        await step.commit()
        assert tmp_path / "step_00000001.log" in synced
        await log.close()

    asyncio.run(run())


def test_samples_of_engines_that_are_not_proven_are_not_written(tmp_path):
    """Neither while the engines answer, nor when the session ends before they have."""

    async def run():
        log = SampleLog(tmp_path)
        log.start_buffering()
        (await log.step(1)).append(0, group())
        log.start_buffering()  # by the session after it
        step = await log.step(1)
        step.append(1, group())
        accepting = asyncio.create_task(step.commit())
        await asyncio.sleep(0)
        written = await log.step(1)
        assert written.restore(0, PROMPT) is None and written.restore(1, PROMPT) is None
        assert not accepting.done()
        log.write_buffered()
        await accepting
        written = await log.step(1)
        assert written.restore(0, PROMPT) is None and written.restore(1, PROMPT) == group()
        assert written.is_committed
        await log.close()

    asyncio.run(run())
