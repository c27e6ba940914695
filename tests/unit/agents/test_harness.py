"""Episodes of agents behind the gateway: how they end, and what their reward is."""

import asyncio
import json
import sys
import textwrap

import aiohttp
import numpy as np
import pytest
from fakes.gateway import WrittenFleet, WrittenParsers, gateway_of, text_of
from liveness import wait_until_dead
from refusals import refused
from waiting import until

from megatron_r1.agents import harness
from megatron_r1.agents.gateway import session
from megatron_r1.agents.harness import CommandHarness, HarnessPlayer, function_harness
from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.controller.rollouts import players
from megatron_r1.controller.rollouts.players import check_player, make_player
from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.server.errors import EngineDied

PROMPT = Prompt("p", "What is 12 * 34?", "math", "408", {"level": 2})
ANSWER = "The answer is 408."


class Clock:
    """A clock of agents and engines that only the test moves."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (harness, session):
        monkeypatch.setattr(module, "time", clock)
    return clock


async def ask(base_url, api_key, text):
    body = {"messages": [{"role": "user", "content": text}]}
    headers = {"Authorization": f"Bearer {api_key}"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{base_url}/chat/completions", json=body, headers=headers) as reply,
    ):
        found = await reply.json()
        if reply.status != 200:
            raise RuntimeError(found["error"]["message"])
        return found["choices"][0]["message"]["content"]


def play(
    run,
    *texts,
    prompt=PROMPT,
    max_turns=5,
    timeout_seconds=10_000.0,
    max_tokens=500,
    sampled=lambda: None,
    max_model_len=9000,
):
    """Return an episode and its fleet. sampled: called when an engine has sampled."""
    text = text_of()
    fleet = WrittenFleet(text.hf_tokenizer, texts)
    keys = []

    async def generate(prompt_ids, most):
        sampled()
        return await fleet.generate(prompt_ids, most)

    def remembering(base_url, api_key, row):
        keys.append(api_key)
        return run(base_url, api_key, row)

    async def main():
        player = HarnessPlayer(
            *(text, gateway_of(text), WrittenParsers(), remembering),
            max_turns=max_turns,
            timeout_seconds=timeout_seconds,
            max_model_len=max_model_len,
        )
        await player.check([])
        try:
            played = await player.play(prompt, generate, max_tokens)
            with pytest.raises(RuntimeError):
                await ask(f"{player.gateway.url}/v1", keys[0], "late")
        finally:
            await player.close()
        return played

    return asyncio.run(main()), fleet


def test_a_function_that_returns_a_reward():
    async def run(base_url, api_key, row):
        assert row == {"question": PROMPT.question, "truth": "408", "level": 2}
        first = await ask(base_url, api_key, row["question"])
        assert first == "Hm."
        return 0.25 if "408" in await ask(base_url, api_key, "So?") else 0.0

    played, fleet = play(run, "Hm.", ANSWER)
    episode = played.episode
    assert (episode.status, played.reward, played.text) == ("done", 0.25, ANSWER)
    assert [turn.trained for turn in episode.turns] == [False, True, False, True]
    assert [branch.num_sampled for branch in episode.branches] == [
        len(response.token_ids) for _, response in fleet.calls
    ]


def test_without_a_reward_ours_grade_the_last_answer():
    async def run(base_url, api_key, row):
        await ask(base_url, api_key, "x")

    played, _ = play(run, ANSWER)
    assert (played.episode.status, played.reward, played.text) == ("done", None, ANSWER)
    own = Prompt("p", "q", "environment", None)
    played, _ = play(run, ANSWER, prompt=own)
    assert played.episode.status == "harness_error"
    assert "reward" in played.episode.reason


@pytest.mark.parametrize("value", [np.float32(0.5), np.bool_(True), np.array([2.0])])
def test_a_reward_of_numpys(value):
    async def run(base_url, api_key, row):
        await ask(base_url, api_key, "x")
        return value

    played, _ = play(run, ANSWER)
    assert (played.episode.status, played.reward) == ("done", float(value.item()))


@pytest.mark.parametrize("value", [float("nan"), "1", [1.0]])
def test_a_reward_that_is_none(value):
    async def run(base_url, api_key, row):
        await ask(base_url, api_key, "x")
        return value

    played, _ = play(run, ANSWER)
    assert (played.episode.status, played.reward) == ("harness_error", None)
    assert repr(value) in played.episode.reason


def test_failures_of_the_agent_are_not_the_policys():
    async def run(base_url, api_key, row):
        await ask(base_url, api_key, "x")
        raise KeyError("tool")

    played, _ = play(run, ANSWER)
    assert (played.episode.status, played.reward) == ("harness_error", None)
    assert played.episode.reason == "KeyError: 'tool'"

    async def silent(base_url, api_key, row):
        return 1.0

    played, _ = play(silent)
    assert (played.episode.status, played.reward) == ("harness_error", None)


def test_an_episode_without_a_turn_of_the_policy_has_no_reward():
    async def hangs(base_url, api_key, row):
        await asyncio.sleep(100_000)

    played, _ = play(hangs, timeout_seconds=0.3)
    assert (played.episode.status, played.reward) == ("harness_error", None)
    assert "0.3 s" in played.episode.reason

    async def careful(base_url, api_key, row):
        try:
            await ask(base_url, api_key, row["question"])
        except RuntimeError:
            return 0.0

    played, _ = play(careful, ANSWER, max_model_len=8)
    assert (played.episode.status, played.reward) == ("harness_error", None)
    assert "8" in played.episode.reason


def test_limits_are_the_policys_doing():
    async def run(base_url, api_key, row):
        while True:
            await ask(base_url, api_key, "again")

    played, fleet = play(run, *"abcdef", max_turns=3)
    assert (played.episode.status, played.reward, len(fleet.calls)) == ("max_turns", 0.0, 3)
    played, fleet = play(run, "x" * 50, "x" * 50, max_tokens=60)
    assert (played.episode.status, played.reward) == ("max_tokens", 0.0)
    assert len(played.episode.response().token_ids) == 60

    async def careful(base_url, api_key, row):
        try:
            await run(base_url, api_key, row)
        except RuntimeError:
            return 0.5

    played, _ = play(careful, *"abc", max_turns=3)
    assert (played.episode.status, played.reward) == ("max_turns", 0.5)


def test_an_agents_clock_stands_still_while_engines_sample(clock):
    def sampled():
        clock.now += 100.0

    async def run(base_url, api_key, row):
        await ask(base_url, api_key, "x")
        clock.now += 0.2
        await asyncio.sleep(0.5)  # the player looks at the clock
        return 1.0

    played, _ = play(run, ANSWER, timeout_seconds=0.3, sampled=sampled)
    assert (played.episode.status, played.reward) == ("done", 1.0)
    assert played.episode.engine_seconds == 100.0
    assert played.episode.tool_seconds == pytest.approx(0.2)

    async def endless(base_url, api_key, row):
        await ask(base_url, api_key, "x")
        clock.now += 0.4
        await asyncio.sleep(100_000)

    played, _ = play(endless, ANSWER, timeout_seconds=0.3, sampled=sampled)
    assert (played.episode.status, played.reward) == ("agent_timeout", 0.0)


def test_an_engine_that_fails_is_no_reward_unless_the_turn_is_repeated():
    async def run(base_url, api_key, row):
        await ask(base_url, api_key, "x")
        return 1.0

    died = EngineDied("engine-0 died, and no restart is left")
    played, _ = play(run, died)
    assert (played.episode.status, played.reward) == ("engine_error", None)
    assert "engine-0 died" in played.episode.reason

    async def stubborn(base_url, api_key, row):
        try:
            await ask(base_url, api_key, "x")
        except RuntimeError:
            return 1.0 if await ask(base_url, api_key, "x") == ANSWER else 0.0

    played, _ = play(stubborn, died, ANSWER)
    assert (played.episode.status, played.reward) == ("done", 1.0)

    async def careless(base_url, api_key, row):
        parts = [ask(base_url, api_key, text) for text in ("x", "y")]
        await asyncio.gather(*parts, return_exceptions=True)
        return 1.0

    played, _ = play(careless, died, ANSWER)
    assert (played.episode.status, played.reward) == ("engine_error", None)


def test_functions_are_found_by_name_and_plain_ones_run_in_a_thread(tmp_path, monkeypatch):
    (tmp_path / "my_agents.py").write_text(
        textwrap.dedent(
            """
            import asyncio, json, urllib.request

            def plain(base_url, api_key, row):
                body = {"messages": [{"role": "user", "content": row["question"]}]}
                request = urllib.request.Request(
                    base_url + "/chat/completions",
                    json.dumps(body).encode(),
                    {"Authorization": "Bearer " + api_key},
                )
                with urllib.request.urlopen(request) as reply:
                    return float("408" in json.load(reply)["choices"][0]["message"]["content"])

            def broken(base_url, api_key, row):
                raise ValueError("no")

            class Agent:
                async def __call__(self, base_url, api_key, row):
                    await asyncio.to_thread(plain, base_url, api_key, row)
                    return 0.25

            agent = Agent()
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    played, fleet = play(function_harness("my_agents:plain"), ANSWER)
    assert (played.episode.status, played.reward, len(fleet.calls)) == ("done", 1.0, 1)
    played, _ = play(function_harness("my_agents:agent"), ANSWER)
    assert (played.episode.status, played.reward) == ("done", 0.25)
    played, _ = play(function_harness("my_agents:broken"))
    assert (played.episode.status, played.episode.reason) == ("harness_error", "ValueError: no")
    with refused("my_agents:plane", Cause.NOT_FOUND, "'plain'"):
        function_harness("my_agents:plane")


@pytest.mark.parametrize(
    ("agents", "data", "key", "cause"),
    [
        ({"environment": "calculator"}, {}, "agents.environment", Cause.CONFLICT),
        ({}, {"template": "plain"}, "data.template", Cause.CONFLICT),
        ({"harness": "no_agents:run"}, {}, "no_agents:run", Cause.NOT_FOUND),
    ],
)
def test_mistakes_of_a_recipe(agents, data, key, cause, monkeypatch):
    monkeypatch.setattr(players, "max_model_len", lambda config: 2000)
    config = Config(agents={"harness": "json:loads"} | agents, data={"template": "chat"} | data)

    def prepare():
        check_player(config, text_of())
        make_player(config, text_of())

    with refused(key, cause):
        prepare()


def test_a_program_per_episode():
    program = textwrap.dedent(
        """
        import json, os, sys, urllib.request
        row = json.load(sys.stdin)
        assert os.environ["ANTHROPIC_BASE_URL"] + "/v1" == os.environ["OPENAI_BASE_URL"]
        body = {"messages": [{"role": "user", "content": row["question"]}], "max_tokens": 90}
        request = urllib.request.Request(
            os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages",
            json.dumps(body).encode(),
            {"x-api-key": os.environ["ANTHROPIC_API_KEY"]},
        )
        print(json.load(urllib.request.urlopen(request))["content"][0]["text"])
        if row["level"] == 3:
            sys.exit("a mistake")
        print(json.dumps({"reward": 0.75}))
        """
    )
    run = CommandHarness([sys.executable, "-c", program], 2)
    played, _ = play(run, ANSWER)
    assert (played.episode.status, played.reward, played.text) == ("done", 0.75, ANSWER)
    wrong = Prompt("p", "q", "math", "1", {"level": 3})
    played, _ = play(run, ANSWER, prompt=wrong)
    assert played.episode.status == "harness_error"
    assert "1: a mistake" in played.episode.reason


def test_of_a_programs_output_the_end_is_kept(monkeypatch):
    monkeypatch.setattr(harness, "OUTPUT_BYTES", 1000)
    program = "import sys; print('x' * 10**6, file=sys.stderr); print('y' * 10**6); print(%s)"

    async def run(ending):
        harness = CommandHarness([sys.executable, "-c", program % ending], 1)
        return await harness("http://nowhere/v1", "key", {"question": "z" * 10**6})

    assert asyncio.run(run("""'{"reward": 0.25}'""")) == 0.25
    with pytest.raises(RuntimeError, match="1: NameError: name 'nothing'"):
        asyncio.run(run("nothing"))

    async def last():
        stream = asyncio.StreamReader()
        stream.feed_data(b"a" * 5000 + b"end")
        stream.feed_eof()
        return await harness._last_bytes(stream)

    assert asyncio.run(last()) == b"a" * 997 + b"end"


def test_waiting_for_another_program_is_not_on_an_agents_clock(clock):
    class Slow(CommandHarness):
        running, most = 0, 0

        async def __call__(self, base_url, api_key, row):
            self.running += 1
            self.most = max(self.most, self.running)
            await ask(base_url, api_key, "x")
            clock.now += 1.0
            await asyncio.sleep(0.5)  # the player looks at the clock
            self.running -= 1
            return 1.0

    text, run = text_of(), Slow(["unused"], 1)
    fleet = WrittenFleet(text.hf_tokenizer, [ANSWER] * 3)

    async def main():
        player = HarnessPlayer(
            *(text, gateway_of(text), WrittenParsers(), run),
            **{"max_turns": 5, "timeout_seconds": 1.4, "max_model_len": 9000},
        )
        await player.check([])
        try:
            return await asyncio.gather(
                *(player.play(PROMPT, fleet.generate, 500) for _ in range(3))
            )
        finally:
            await player.close()

    played = asyncio.run(main())
    assert [(each.episode.status, each.reward) for each in played] == [("done", 1.0)] * 3
    assert run.most == 1


def test_a_program_that_hangs_is_killed(tmp_path, monkeypatch, clock):
    pid = tmp_path / "pid"
    program = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()))"
    (tmp_path / "agent.py").write_text(f"{program}; time.sleep(100_000)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").symlink_to(sys.executable)
    run = CommandHarness(["./python", "agent.py"], 2)
    assert run._command[0] == str(tmp_path / "python"), "links are not followed"

    async def hang(*arguments):
        ending = asyncio.create_task(until(lambda: pid.exists() and pid.read_text()))
        ending.add_done_callback(lambda _: setattr(clock, "now", 3.0))
        return await run(*arguments)

    played, _ = play(hang, timeout_seconds=2.0)
    assert "2 s" in played.episode.reason
    assert wait_until_dead(int(pid.read_text()))


@pytest.mark.more
def test_smolagents_unmodified():
    smolagents = pytest.importorskip("smolagents", reason="make test-packages")

    @smolagents.tool
    def calculate(expression: str) -> str:
        """Compute an expression.

        Args:
            expression: what to compute
        """
        return str(12 * 34)

    def call(name, **arguments):
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    async def run(base_url, api_key, row):
        model = smolagents.OpenAIServerModel("policy", api_base=base_url, api_key=api_key)
        agent = smolagents.ToolCallingAgent([calculate], model, max_steps=4, verbosity_level=0)
        return float(await asyncio.to_thread(agent.run, row["question"]) == "408")

    texts = call("calculate", expression="12 * 34"), call("final_answer", answer="408")
    played, fleet = play(run, *texts, max_tokens=9000)
    assert (played.episode.status, played.reward) == ("done", 1.0)
    assert len(fleet.calls) == 2 and played.episode.num_tool_calls == 2
