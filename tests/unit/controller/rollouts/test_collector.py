"""What a failure ends: the other work for the same group, before the caller hears of it; which
phases a group goes through; and what `close` ends."""

import asyncio
from array import array
from types import SimpleNamespace

import pytest

from megatron_r1.base.errors import RunError
from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.in_flight import InFlightGroup
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, RolloutSampling
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response

PROMPT = make_prompt("2 + 11?", "math", "13", {})
TEXT = SimpleNamespace(
    encode=lambda question, before=(): [1],
    decode=lambda ids: "x",
    stop_token_ids=[0],
    opens_thought=False,
    closed_thought="",
)


class Endless:
    """Work that ends only when it is cancelled, which `cancelled` counts."""

    def __init__(self):
        self.begun, self.cancelled = asyncio.Event(), 0

    async def __call__(self, *args, **fields):
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled += 1


class Engine:
    state = SimpleNamespace(require_usable=lambda: None)

    async def generate(self, prompt_ids, n, **sampling):
        return [Response([1], [0.0], [0], "stop")] * n


def cancelled_when(endless, collector, **sampling):
    """Return how much endless work was cancelled when `collect` raised RunError itself."""

    async def run():
        with pytest.raises(RunError, match="broken"):
            await collector.collect([PROMPT], RolloutSampling(2, 1.0, 1.0, 8, **sampling))
        return endless.cancelled

    return asyncio.run(run())


def test_grading_that_fails_ends_the_teacher_s_calls():
    endless = Endless()

    async def grade(prompt, responses, weights):
        await endless.begun.wait()
        raise RunError("broken")

    teachers = SimpleNamespace(compute_logprobs=endless)
    collector = RolloutCollector(Engine(), None, TEXT, RewardsConfig(), teachers)
    collector.grader = SimpleNamespace(grade=grade)
    assert cancelled_when(endless, collector, with_teacher=True) == 2


def test_a_teacher_s_call_that_fails_ends_the_others():
    endless = Endless()

    async def compute_logprobs(prompt, token_ids, first, step):
        if endless.begun.is_set():
            raise RunError("broken")
        return await endless()

    async def grade(prompt, responses, weights):
        return []

    teachers = SimpleNamespace(compute_logprobs=compute_logprobs)
    collector = RolloutCollector(Engine(), None, TEXT, RewardsConfig(), teachers)
    collector.grader = SimpleNamespace(grade=grade)
    assert cancelled_when(endless, collector, with_teacher=True) == 1


def test_an_episode_that_fails_ends_the_others_of_its_group():
    endless = Endless()

    async def play(prompt, generate, max_tokens):
        if endless.begun.is_set():
            raise RunError("broken")
        return await endless()

    collector = RolloutCollector(
        Engine(), None, TEXT, RewardsConfig(), player=SimpleNamespace(play=play)
    )
    assert cancelled_when(endless, collector) == 1


def test_a_closed_collector_has_no_thread_left():
    collector = RolloutCollector(Engine(), None, TEXT, RewardsConfig())
    response = Response([1], [0.0], [0], "stop")

    async def run():
        await collector.close()
        with pytest.raises(RuntimeError, match="shutdown"):
            await collector.grader.grade(PROMPT, [response], {})

    asyncio.run(run())


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_group_waits_for_a_teacher_only_where_there_is_one(monkeypatch, with_teacher):
    phases = []

    async def grade(prompt, responses, weights):
        return [GradedResponse(response, "x", {}, 0.0, "") for response in responses]

    async def compute_logprobs(prompt, token_ids, first, step):
        return array("f", [0.0])

    monkeypatch.setattr(InFlightGroup, "_enter_phase", lambda group, phase: phases.append(phase))
    teachers = SimpleNamespace(compute_logprobs=compute_logprobs)
    collector = RolloutCollector(Engine(), None, TEXT, RewardsConfig(), teachers)
    collector.grader = SimpleNamespace(grade=grade)
    sampling = RolloutSampling(2, 1.0, 1.0, 8, with_teacher=with_teacher)
    asyncio.run(collector.collect([PROMPT], sampling))
    assert phases == ["sampling", "grading", *["awaiting_teacher"] * with_teacher]


def test_a_group_of_the_log_that_is_graded_again_does_not_count_as_sampled():
    async def grade(prompt, responses, weights):
        return [GradedResponse(response, "x", {}, 0.0, "") for response in responses]

    response = Response([1], [0.0], [0], "stop")
    restored = Group(PROMPT, [1], [GradedResponse(response, "x", {}, 0.0, "")])
    step_log = SimpleNamespace(
        reserve=range,
        restore=lambda index, prompt, only_final: restored if index == 0 else None,
        is_final=lambda group: False,
        append=lambda *record: None,
    )
    collector = RolloutCollector(Engine(), None, TEXT, RewardsConfig())
    collector.grader = SimpleNamespace(grade=grade)
    asyncio.run(collector.collect([PROMPT] * 2, RolloutSampling(3, 1.0, 1.0, 8), step_log))
    counts = collector.in_flight
    assert (counts.num_sampled, counts.num_responses, counts.num_tokens) == (1, 3, 3)
    assert counts.num_finished == 2
