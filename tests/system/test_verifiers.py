"""An environment of verifiers 0.4.0 runs unmodified, by chat and by tokens, and its server's end
is no reward. Needs `make agents`."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from command_line import AGENTS_PYTHON
from fakes.gateway import WrittenFleet, WrittenParsers, gateway_of, text_of

from megatron_r1.agents.harness import HarnessPlayer
from megatron_r1.agents.verifiers import VerifiersHarness, list_tasks
from megatron_r1.config import VerifiersConfig
from megatron_r1.data.prompt import Prompt

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(not AGENTS_PYTHON.exists(), reason="make agents"),
]


@pytest.mark.parametrize("client", [pytest.param("chat", marks=pytest.mark.slow), "tokens"])
def test_an_environment_runs_and_its_trace_has_the_tokens_of_the_tree(
    tmp_path, monkeypatch, client
):
    monkeypatch.chdir(HERE)
    text = text_of()
    text.hf_tokenizer.save_pretrained(tmp_path)
    renderer = {"name": "default"} if client == "tokens" else None
    settings = VerifiersConfig(
        python=str(AGENTS_PYTHON), taskset="verifiers_sums", harness="verifiers_sums",
        taskset_options={"num_tasks": 2}, client=client, renderer=renderer,
    )  # fmt: skip
    tasks = list_tasks(settings)
    assert [task["answer"] for task in tasks] == [1, 2]
    fleet = WrittenFleet(text.hf_tokenizer, ["Hm.", "It is 1.", "Hm.", "It is 5.", "Hm.", "Hm."])

    async def main():
        run = VerifiersHarness(settings, str(tmp_path))
        player = HarnessPlayer(
            *(text, gateway_of(text), WrittenParsers(), run),
            **{"max_turns": 9, "timeout_seconds": 36000.0, "max_model_len": 9000},
        )
        await player.check([])

        def play(number):
            prompt = Prompt("p", "q", "environment", None, {"task": tasks[number]})
            return player.play(prompt, fleet.generate, 2000)

        try:
            played = [await play(0), await play(1)]
            fleet.ready.clear()
            cut = asyncio.create_task(play(0))
            while len(fleet.texts) > 1:
                await asyncio.sleep(0.05)
            os.killpg(run._process.pid, signal.SIGKILL)
            return [*played, await cut]
        finally:
            await player.close()

    right, wrong, cut = asyncio.run(main())
    assert (right.episode.status, right.reward) == ("done", 1.0), right.episode.reason
    assert (wrong.episode.status, wrong.reward) == ("done", 0.0)
    assert [turn.trained for turn in wrong.episode.turns].count(True) == 2
    assert (cut.episode.status, cut.reward) == ("environment_error", None)
