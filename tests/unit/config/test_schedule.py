"""`rl.schedule`: settings from a step on, checked before the run starts."""

from pathlib import Path

from r1_grading.terms import weights_at
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import RESUMABLE, dump_recipe, known_keys, load_recipe, parse_recipe
from megatron_r1.config.recipe import SCHEDULED
from megatron_r1.controller.policy_trainer import PolicyTrainer
from megatron_r1.engines.server.model_config import max_model_len

R1_ZERO = Path(__file__).parents[3] / "examples/deepseek_r1/r1_zero.yaml"


def scheduled(*entries, **sections):
    return parse_recipe({**sections, "rl": {"schedule": list(entries)}})


def test_a_step_has_all_changes_up_to_it():
    config = scheduled(
        {"from_step": 3, "rollout.max_response_tokens": 65536, "optimizer.learning_rate": "1e-6"},
        {"from_step": 5, "rl.kl_beta": 0.0, "optimizer.learning_rate": 5e-7},
    )
    seen = [
        (c.rollout.max_response_tokens, c.optimizer.learning_rate, c.rl.kl_beta)
        for c in map(config.at, (1, 2, 3, 4, 5, 100))
    ]
    first, second, third = (32768, 3e-6, 1e-3), (65536, 1e-6, 1e-3), (65536, 5e-7, 0.0)
    assert seen == [first, first, second, second, third, third]
    assert [step for step, _ in config.schedule_parts()] == [1, 3, 5]
    assert config.at(2) == config.at(1)


def test_a_change_at_the_first_step_is_no_phase_of_its_own():
    config = scheduled({"from_step": 1, "rl.kl_beta": 0.5})
    assert [(step, c.rl.kl_beta) for step, c in config.schedule_parts()] == [(1, 0.5)]


def test_kinds_of_questions_and_weights_of_rewards_change_as_a_whole():
    config = scheduled(
        {"from_step": 4, "rl.kind_weights": {"math": 0.5}, "rewards.weights": {"helpful": 1}},
        {"from_step": 6, "rl.kind_weights": {}},
        rewards={"weights": {"accuracy": 1.0, "format": 0.1}},
    )
    kinds = [config.at(step).rl.kind_weights for step in (3, 4, 5, 6)]
    assert kinds == [{}, {"math": 0.5}, {"math": 0.5}, {}]
    weights = [weights_at(config.at(step).rewards.weights, step) for step in (3, 4, 6)]
    assert weights == [{"accuracy": 1.0, "format": 0.1}, {"helpful": 1}, {"helpful": 1}]


def test_updates_are_counted_with_the_minibatches_of_each_step():
    config = scheduled({"from_step": 3, "rl.minibatches": 4}, {"from_step": 4, "rl.minibatches": 8})
    by_hand = [0, 16, 32, 36, 44, 52]
    assert [config.updates_before(step) for step in (1, 2, 3, 4, 5, 6)] == by_hand
    assert parse_recipe({}).updates_before(651) == 10_400


def test_the_learning_rate_falls_over_the_updates_of_all_parts():
    config = scheduled(
        {"from_step": 3, "rl.minibatches": 4},
        run={"steps": 3},
        optimizer={"learning_rate": 1.0, "decay": "linear"},
    )
    policy_trainer = PolicyTrainer(config, trainer=None, state=None)
    assert policy_trainer.num_policy_updates == 36


def test_it_survives_the_recipe_that_a_run_writes(tmp_path):
    config = scheduled({"from_step": 3, "rollout.temperature": 0.7})
    (tmp_path / "config.yaml").write_text(dump_recipe(config))
    assert load_recipe(tmp_path / "config.yaml") == config
    assert "rl.schedule" in RESUMABLE


def test_engines_have_room_for_the_longest_responses_of_the_run(monkeypatch):
    monkeypatch.chdir(R1_ZERO.parents[2])  # model.path is relative
    assert max_model_len(load_recipe(R1_ZERO)) == 67584
    with refused("rollout.max_response_tokens", Cause.TOO_LARGE, 65536):
        max_model_len(load_recipe(R1_ZERO, {"rollout.max_model_len": 34816}))


def test_r1_zero_has_the_papers_two_phases():
    config = load_recipe(R1_ZERO)
    (_, before), (step, after) = config.schedule_parts()
    lengths = before.rollout.max_response_tokens, after.rollout.max_response_tokens
    assert lengths == (32768, 65536)
    # arXiv 2501.12948 v2: from optimizer step 8,200 on; a rollout has 16.
    assert (step - 1) * config.rl.minibatches <= 8200 < step * config.rl.minibatches


def test_the_settings_that_can_change_are_those_that_a_step_reads():
    assert set(known_keys()) > set(SCHEDULED) > {"rl.kl_beta", "rewards.weights"}
    # Ranks and engines are built with these.
    assert not {"rl.algorithm", "rl.staleness", "critic.path"} & set(SCHEDULED)
