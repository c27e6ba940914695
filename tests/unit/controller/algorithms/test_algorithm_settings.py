"""Which settings an algorithm runs with, and what becomes of rewards on their way to it."""

import asyncio
import math
import subprocess
import sys
from array import array
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
import yaml

from megatron_r1.config import Config, RLConfig, dump_recipe, load_recipe, parse_recipe
from megatron_r1.config.algorithms import ALGORITHM_NAMES
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections.overlong_penalty import overlong_penalty
from megatron_r1.controller.loop import split_into_minibatches, training_reward, update_networks
from megatron_r1.controller.policy_trainer import PolicyTrainer
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.controller.run_recorder import RunState
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.episodes import Branch, Episode
from megatron_r1.engines.server.responses import Response
from megatron_r1.trainer.operations import ModelOperations


def test_the_recipe_comes_before_the_preset_before_the_algorithm_before_the_field(tmp_path):
    path = tmp_path / "recipe.yaml"

    def settings(**rl):
        path.write_text(yaml.safe_dump({"rl": rl}))
        return load_recipe(path).rl

    plain = settings()
    assert (plain.algorithm, plain.clip_high, plain.kl_beta) == ("grpo", 10.0, 0.001)
    dapo = settings(algorithm="dapo")
    assert (dapo.clip_low, dapo.clip_high, dapo.dynamic_sampling) == (0.2, 0.28, True)
    assert (dapo.group_size, dapo.minibatches) == (16, 16), "R1-Zero's, where DAPO says nothing"
    preset = settings(algorithm="dapo", preset="grpo_v1")
    assert (preset.clip_high, preset.kl_beta, preset.loss_average) == (0.2, 0.04, "token")
    own = settings(algorithm="dapo", preset="grpo_v1", clip_high=0.3)
    assert (own.clip_high, own.clip_low) == (0.3, 0.2)


def test_what_is_written_down_is_what_is_read_again(tmp_path):
    path = tmp_path / "config.yaml"
    for name in ALGORITHM_NAMES:
        config = Config(rl={"algorithm": name})
        path.write_text(dump_recipe(config))
        assert load_recipe(path) == config == parse_recipe(config.model_dump())


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_an_algorithm_s_defaults_are_settings_that_fit_it(name):
    algorithm = algorithms.find_algorithm(name)
    assert algorithm.name == name
    settings = RLConfig(algorithm=name)
    for key, value in algorithm.rules.defaults.items():
        assert getattr(settings, key) == value
    assert settings.advantage_std in algorithm.rules.advantage_stds


def test_the_penalty_of_kl_is_in_the_reward_or_in_the_loss_but_not_in_both():
    in_reward = {"rloo", "reinforce_pp", "ppo"}
    for name in ALGORITHM_NAMES:
        settings = RLConfig(algorithm=name, kl_beta=0.5)
        assert settings.token_advantage_settings.kl_beta == 0.5
        assert settings.loss_settings(8).kl_beta == (0.0 if name in in_reward else 0.5)


def test_one_output_a_question_is_enough_where_the_group_is_no_baseline():
    for name in ("reinforce", "reinforce_pp", "ppo", "on_policy_distillation"):
        assert RLConfig(algorithm=name, group_size=1).group_size == 1


def test_the_controller_needs_neither_torch_nor_agents_for_single_turns():
    code = (
        "import sys; from megatron_r1.commands import dry_run, rl, rollout_services; "
        "from megatron_r1.config import Config; from megatron_r1.controller import algorithms; "
        f"[algorithms.find_algorithm(name) for name in {ALGORITHM_NAMES!r}]; "
        "assert rollout_services.open_player(Config(), None) is None; "
        "agents = [m for m in sys.modules if m.startswith('megatron_r1.agents')]; "
        "print({m for m in sys.modules} & {'torch', 'megatron', 'vllm'}, agents)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set() []", done.stderr


def test_a_penalty_grows_from_0_to_1_over_the_buffer():
    # DAPO's: 20,480 tokens at most, the last 4,096 of them penalized.
    lengths = [1, 16_384, 17_408, 18_432, 20_480, 30_000]
    got = [overlong_penalty(n, 20_480, 0.2) for n in lengths]
    assert got == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert overlong_penalty(20_480, 20_480, 0.0) == 0.0


def graded(reward, num_tokens, is_graded=True):
    response = Response([1] * num_tokens, [0.0] * num_tokens, [0] * num_tokens, "stop")
    rewards = {"accuracy": reward, "format": 1.0}
    return GradedResponse(response, "x", rewards, reward, "", is_graded=is_graded)


def test_long_responses_are_penalized_before_advantages_are_computed():
    responses = [graded(1.0, 10), graded(1.0, 40), graded(0.0, 35), graded(0.0, 5, is_graded=False)]
    group = Group(make_prompt("1 + 1?", "math", "2", {}), [1], responses)
    rl = {"algorithm": "dr_grpo", "overlong_buffer": 0.5, "overlong_penalty": 2.0}
    config = Config(rl=rl, rollout={"max_response_tokens": 40})
    # The last 20 of 40 tokens: 1, 1 - 2, 0 - 2 x 0.75; mean -0.5
    rewards = [training_reward(each, config) for each in responses]
    advantages = algorithms.find_algorithm("dr_grpo").outcome_advantages([rewards], config.rl)
    samples = training_samples([group], advantages)
    assert [sample.outcome_advantage for [sample] in samples] == pytest.approx(
        [1.5, -0.5, -1.0, math.nan], nan_ok=True
    )


def branch(tokens, is_sampled):
    count = len(tokens)
    floats, versions = array("f", [-0.5] * count), array("i", [0] * count)
    return Branch(array("i", tokens), bytes(is_sampled), floats, versions)


def test_an_episode_s_branches_stay_in_one_minibatch_and_weigh_as_one_response():
    branches = [branch([1, 2, 3, 4, 5], [0, 1, 0, 1, 1]), branch([1, 7, 8], [0, 0, 1])]
    episodes = [Episode("done", [], branches), Episode("engine_error", [], [])]
    several, nothing = (
        replace(graded(1.0, 0), response=e.response(), episode=e, teacher_logprobs=logprobs)
        for e, logprobs in zip(episodes, [array("f", [-1, -2, -3, -4]), array("f")], strict=True)
    )
    responses = [several, graded(0.5, 4), nothing, graded(0.0, 3)]
    group = Group(make_prompt("1 + 1?", "math", "2", {}), [1], responses)
    samples = training_samples([group], [[1.0, 2.0, 0.0, 3.0]])
    assert [len(each) for each in samples] == [2, 1, 1, 1]
    first, second = split_into_minibatches(samples, 2)
    assert [s.is_trained for s in first + second] == [True, True, False, True, True]
    assert [s.outcome_advantage for s in first[:2] + second] == [1.0, 1.0, 2.0, 3.0]
    assert [s.weight for s in first] == [0.75, 0.25, 1.0]
    assert [s.num_responses for s in first + second] == [1, 0, 1, 1, 1]
    logprobs = [array("f", [-1, 0, -2, -3]), array("f", [-4])]
    assert [s.teacher_logprobs for s in first[:2]] == [each.tobytes() for each in logprobs]
    assert len(first[2]) == 1, "nothing was sampled, and the response is in no mean"


class Peers:
    """A trainer that records the requested updates."""

    def __init__(self):
        self.requested = []

    async def update(self, minibatch_index, loss, settings, learning_rate, temperature):
        self.requested.append((minibatch_index, loss))
        return {"loss": 1.0}

    async def update_critic(self, minibatch_index, learning_rate):
        self.requested.append((minibatch_index, "critic"))
        return {"value/loss": 2.0}


def updated(name, index, step):
    """Return the metrics of an update of step `step`, where three warm up, and the requests."""
    config, peers = Config(rl={"algorithm": name}, critic={"warmup_steps": 3}), Peers()
    tested = PolicyTrainer(config, peers, RunState())
    metrics = asyncio.run(update_networks(tested, config, index, step))
    metrics.pop("learning_rate", None)
    return metrics, peers.requested


def test_the_policy_waits_for_the_critic_to_be_warm():
    ppo, grpo = algorithms.find_algorithm("ppo"), algorithms.find_algorithm("grpo")
    assert updated("ppo", 3, step=1)[1] == [(3, "critic")]
    assert updated("ppo", 3, step=3) == ({"value/loss": 2.0}, [(3, "critic")])
    both = [(3, "critic"), (3, ppo.loss)]
    assert updated("ppo", 3, step=4) == ({"value/loss": 2.0, "loss": 1.0}, both)
    assert updated("grpo", 4, step=1) == ({"loss": 1.0}, [(4, grpo.loss)])


def test_the_reference_is_not_replaced_before_the_first_update_of_the_policy():
    config = Config(rl={"kl_beta": 0.1, "reference_refresh": 8, "minibatches": 4})
    calls, state = [], RunState()
    trainer = SimpleNamespace(call=AsyncMock(side_effect=calls.append))
    tested = PolicyTrainer(config, trainer, state)
    for state.optimizer_step in (0, 4, 8, 12, 16):
        asyncio.run(tested.refresh_reference_if_due(config))
        calls.append(state.optimizer_step)
    refresh = ModelOperations.refresh_reference
    assert calls == [0, 4, refresh, 8, 12, refresh, 16]


def passes(config):
    return PolicyTrainer(config, trainer=None, state=None)


@pytest.mark.parametrize(("algorithm", "updates"), [("ppo", (100 - 40) * 16), ("grpo", 100 * 16)])
def test_the_policy_s_rate_decays_over_its_own_updates(algorithm, updates):
    """PPO's critic alone learns in the first 40 of 100 steps; other algorithms have none."""
    tree = {"rl": {"algorithm": algorithm}, "run": {"steps": 100}, "critic": {"warmup_steps": 40}}
    assert passes(parse_recipe(tree)).num_policy_updates == updates
