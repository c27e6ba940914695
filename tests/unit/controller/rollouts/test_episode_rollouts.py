"""Rollouts of episodes: groups of them, in the sample log and after a restart."""

import asyncio
from array import array
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

from megatron_r1.agents.token_tree import TokenTree
from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.episodes import Branch, Episode, EpisodeResult, Turn
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.sampling_mask import encode_mask

PROMPTS = [make_prompt(f"row {i}", "environment", None, {}) for i in range(3)]
SAMPLING = RolloutSampling(2, 1.0, 1.0, 64, reward_weights={"accuracy": 1.0})
TEXT = SimpleNamespace(
    encode=lambda question, before=(): [1, 2],
    stop_token_ids=[0],
    opens_thought=False,
    closed_thought="",
)
FLEET = SimpleNamespace(state=SimpleNamespace(require_usable=lambda: None))


class Player:
    """Plays episodes of two turns; those of row 1 fail while `is_broken`."""

    def __init__(self, is_broken=False):
        self.played, self.is_broken = [], is_broken

    async def play(self, prompt, generate, max_tokens):
        number = len(self.played)
        self.played.append(prompt.question)
        branch = Branch(
            array("i", [1, 2, 10 + number, 3, 11]),
            b"\0\0\1\0\1",
            array("f", [0, 0, -0.5, 0, -number - 1]),
            array("i", [-1, -1, 4, -1, 5]),
        )
        turns = [Turn("user", "lone \ud800", 2, False), Turn("assistant", "yes", 1, True, 4)]
        if self.is_broken and prompt is PROMPTS[1]:
            episode = Episode("environment_error", turns, [], reason="gone")
            return EpisodeResult(episode, "", None)
        return EpisodeResult(Episode("done", turns, [branch], 1, 0, 0.1, 0.2), "yes", float(number))


def rollout(path, player):
    async def run():
        log = SampleLog(path)
        collector = RolloutCollector(FLEET, None, TEXT, RewardsConfig(), player=player)
        try:
            step = await log.step(1)
            found = await collector.collect(PROMPTS, SAMPLING, step)
            return found.groups, step.num_restored
        finally:
            await log.close()

    return asyncio.run(run())


def test_episodes_come_back_from_the_sample_log_as_they_were(tmp_path):
    player = Player()
    groups, num_restored = rollout(tmp_path, player)
    assert (len(player.played), num_restored) == (6, 0)
    assert [graded.reward for group in groups for graded in group.responses] == [0, 1, 2, 3, 4, 5]
    first = groups[0].responses[0].response
    assert (first.token_ids.tolist(), first.policy_versions.tolist()) == ([10, 11], [4, 5])
    again = Player()
    replayed, num_restored = rollout(tmp_path, again)
    assert (again.played, num_restored) == ([], 3)
    assert replayed == groups


def test_a_group_with_an_episode_that_failed_is_played_again(tmp_path):
    groups, _ = rollout(tmp_path, Player(is_broken=True))
    assert [graded.is_graded for graded in groups[1].responses] == [False, False]
    again = Player()
    repaired, num_restored = rollout(tmp_path, again)
    assert again.played == ["row 1"] * 2 and num_restored == 2
    assert all(graded.is_graded for group in repaired for graded in group.responses)
    assert repaired[0] == groups[0]


class TwoTurns:
    """Plays episodes of two sampled turns with a given token between them."""

    async def play(self, prompt, generate, max_tokens):
        tree, node = TokenTree(), None
        for given in ([1, 2], [3]):
            node = tree.add_prompt(node, given, [{"role": "user", "content": "go"}])
            answer = await generate(tree.token_ids(node), max_tokens)
            node = tree.add_sampled(node, answer, {"role": "assistant", "content": "yes"})
        turns = [Turn("assistant", "yes", 2, True, 4)]
        return EpisodeResult(Episode("done", turns, tree.branches(), 1, 0, 0.1, 0.2), "yes", 1.0)


def test_turns_drawn_from_a_part_of_the_vocabulary_are_samples_with_what_was_kept(tmp_path):
    asked = []

    async def generate(token_ids, *, n, top_p, top_k, min_p, sampling_mask, **_):
        asked.append((n, top_p, top_k, min_p, sampling_mask))
        ids = [10 + len(token_ids), 20]
        kept = encode_mask([[0, ids[0]], [20, 30, 31]])
        numbers = array("f", [-1, -2]), array("i", [4, 4])
        return [Response(array("i", ids), *numbers, "stop", sampling_mask=kept)]

    fleet = SimpleNamespace(generate=generate, state=FLEET.state)
    cut = replace(SAMPLING, top_p=0.9, top_k=8, min_p=0.1, sampling_mask=True)

    async def run():
        log = SampleLog(tmp_path)
        collector = RolloutCollector(fleet, None, TEXT, RewardsConfig(), player=TwoTurns())
        try:
            return (await collector.collect(PROMPTS[:1], cut, await log.step(1))).groups
        finally:
            await log.close()

    made, recalled = asyncio.run(run()), asyncio.run(run())
    assert set(asked) == {(1, 0.9, 8, 0.1, True)} and len(asked) == 4
    for groups in (made, recalled):
        for sample in chain.from_iterable(training_samples(groups, [[0.5, 0.5]])):
            assert array("i", bytes(sample.token_ids)).tolist() == [1, 2, 12, 20, 3, 15, 20]
            assert sample.sampling_mask == encode_mask(
                [[0, 12], [20, 30, 31], [], [0, 15], [20, 30, 31]]
            )
