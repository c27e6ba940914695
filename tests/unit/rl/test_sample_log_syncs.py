"""Samples are on disk before a policy is trained on them."""

import asyncio
from array import array

from syncs import recorded_syncs

from megatron_r1.data.prompts import make_prompt
from megatron_r1.engine.responses import Response
from megatron_r1.rl import sample_log
from megatron_r1.rl.rollout import GradedResponse, Group
from megatron_r1.rl.sample_log import SampleLog


def test_a_batch_is_synced_before_it_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_log, "SYNC_SECONDS", 1e6)  # not by the timer
    response = Response(array("i", [1]), array("f", [-1.0]), array("i", [0]), "stop")
    graded = GradedResponse(response, "x", {"accuracy": 1.0}, 1.0, "")
    prompt = make_prompt("question", "math", "1", {})

    async def run():
        log = SampleLog(tmp_path)
        step = await log.step(1)
        step.keep(0, Group(prompt, [5], [graded]))
        synced = recorded_syncs(monkeypatch)
        await step.accept()
        assert tmp_path / "step_00000001.log" in synced
        await log.close()

    asyncio.run(run())
