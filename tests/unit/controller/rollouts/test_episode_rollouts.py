"""Rollouts of episodes: groups of them, in the sample log and after a restart."""

import asyncio
from array import array
from types import SimpleNamespace

from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.data.prompts import make_prompt
from megatron_r1.engines.server.episodes import Branch, Episode, Played, Turn

PROMPTS = [make_prompt(f"row {i}", "environment", None, {}) for i in range(3)]
SAMPLING = RolloutSampling(2, 1.0, 1.0, 64, reward_weights={"accuracy": 1.0})
TEXT = SimpleNamespace(
    encode=lambda question, before=(): [1, 2],
    stop_token_ids=[0],
    opens_thought=False,
    closed_thought="",
)
FLEET = SimpleNamespace(members=SimpleNamespace(require_usable=lambda: None))


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
            return Played(episode, "", None)
        return Played(Episode("done", turns, [branch], 1, 0, 0.1, 0.2), "yes", float(number))


def rollout(path, player):
    async def run():
        log = SampleLog(path)
        collector = RolloutCollector(FLEET, None, TEXT, RewardsConfig(), player=player)
        try:
            step = await log.step(1)
            found = await collector.collect(PROMPTS, SAMPLING, step)
            return found.groups, step.num_replayed
        finally:
            await log.close()

    return asyncio.run(run())


def test_episodes_come_back_from_the_sample_log_as_they_were(tmp_path):
    player = Player()
    groups, num_replayed = rollout(tmp_path, player)
    assert (len(player.played), num_replayed) == (6, 0)
    assert [graded.reward for group in groups for graded in group.responses] == [0, 1, 2, 3, 4, 5]
    first = groups[0].responses[0].response
    assert (first.token_ids.tolist(), first.policy_versions.tolist()) == ([10, 11], [4, 5])
    again = Player()
    replayed, num_replayed = rollout(tmp_path, again)
    assert (again.played, num_replayed) == ([], 3)
    assert replayed == groups


def test_a_group_with_an_episode_that_failed_is_played_again(tmp_path):
    groups, _ = rollout(tmp_path, Player(is_broken=True))
    assert [graded.is_graded for graded in groups[1].responses] == [False, False]
    again = Player()
    repaired, num_replayed = rollout(tmp_path, again)
    assert again.played == ["row 1"] * 2 and num_replayed == 2
    assert all(graded.is_graded for group in repaired for graded in group.responses)
    assert repaired[0] == groups[0]
