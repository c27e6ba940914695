"""Episodes of an environment server in another Python: outcomes, losses, and its record of the
tokens. verifiers itself: tests/system/test_verifiers.py."""

import asyncio
import sys
from pathlib import Path

import pytest
from fakes.gateway import WrittenFleet, WrittenParsers, gateway_of, text_of
from refusals import refused

from megatron_r1.agents.environment_pool import EnvironmentFailed
from megatron_r1.agents.environment_prompts import load_run_prompts
from megatron_r1.agents.harness import HarnessPlayer
from megatron_r1.agents.verifiers import verifiers_harness
from megatron_r1.base.errors import Cause
from megatron_r1.config import AgentsConfig, VerifiersConfig
from megatron_r1.data.prompt import Prompt

STAND_IN = Path(__file__).with_name("verifiers_stand_in.py")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(verifiers_harness, "SCRIPT", STAND_IN)


def settings(**options):
    return VerifiersConfig(python=sys.executable, client="tokens", **{"taskset": "t"} | options)


def play(*does):
    """Play an episode for each of `does`, one after the other."""
    text = text_of()
    fleet = WrittenFleet(text.hf_tokenizer, ["answer"] * len(does))

    async def main():
        run = verifiers_harness.VerifiersHarness(settings(), "")
        player = HarnessPlayer(
            *(text, gateway_of(text), WrittenParsers(), run),
            **{"max_turns": 9, "timeout_seconds": 10_000.0, "max_model_len": 9000},
        )
        await player.check([])
        try:
            return [
                await player.play(
                    Prompt("p", "q", "environment", None, {"task": {"does": each}}),
                    fleet.generate,
                    100,
                )
                for each in does
            ]
        finally:
            await player.close()

    return asyncio.run(main())


def test_outcomes():
    well, fails, other, dies, again = play("well", "fail", "other tokens", "die", "well")
    assert (well.episode.status, well.reward) == ("done", 0.5)
    assert (fails.episode.status, fails.reward) == ("harness_error", None)
    assert "ToolError: no tool" in fails.episode.reason
    assert (other.episode.status, other.reward) == ("protocol_error", None)
    assert "1 sequences" in other.episode.reason
    assert (dies.episode.status, dies.reward) == ("environment_error", None)
    assert "a bug" in dies.episode.reason
    assert (again.episode.status, again.reward) == ("done", 0.5), "it is started again"


SERVER = """
import os, time

def serve_env(address_queue, config_data, **_):
    address_queue.put("here")
    while not os.path.exists("asked"):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
CLIENT = """
import asyncio

class EnvClient:
    def __init__(self, address):
        assert address == "here"

    async def wait_for_server_startup(self, seconds):
        pass

    async def run(self, *_):
        open("asked", "w").close()
        await asyncio.sleep(1000)
"""
CONFIGS = "EvalClientConfig = TrainClientConfig = SamplingConfig = dict"


def test_a_server_that_is_killed_is_noticed(tmp_path, monkeypatch):
    files = {"serve/pool": SERVER, "serve/client": CLIENT, "configs/client": CONFIGS}
    for name, code in (files | {"types": CONFIGS}).items():
        path = tmp_path / f"verifiers/v1/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    monkeypatch.setattr(
        verifiers_harness, "SCRIPT", Path(verifiers_harness.__file__).with_name("serve.py")
    )
    monkeypatch.chdir(tmp_path)

    async def main():
        run = verifiers_harness.VerifiersHarness(settings(), "")
        try:
            with pytest.raises(EnvironmentFailed):
                await run("http://127.0.0.1:1/v1", "key", {"task": {}})
        finally:
            await run.close()

    asyncio.run(main())


def test_tasks_are_the_questions():
    rows = load_run_prompts(
        AgentsConfig(verifiers=settings()), path=None, task=None, heldout_fraction=0.0
    )
    assert len(rows.train) == 4
    row = rows.train[0]
    assert row.fields["task"] == {"prompt": row.question, "does": "well"}
    assert row.kind == "environment"


@pytest.mark.parametrize(
    ("options", "key", "cause"),
    [
        ({"taskset": "missing"}, "agents.verifiers.taskset", Cause.FAILED),
        ({"python": "/no/python"}, "agents.verifiers.python", Cause.NOT_FOUND),
    ],
)
def test_mistakes(options, key, cause):
    with refused(key, cause, *options.values()):
        verifiers_harness.list_tasks(settings().model_copy(update=options))
