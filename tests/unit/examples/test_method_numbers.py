"""The numbers of DeepSeek-R1's method, `method_numbers.yaml`, against the recipes that ship.

Sections are those of arXiv 2501.12948, v2 unless said otherwise. Steps of the paper are optimizer
steps; a recipe's are rollouts of 16."""

from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from refusals import refused

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.config import Config, algorithms
from megatron_r1.pipeline.pipeline_recipe import read_tree

EXAMPLES = Path(__file__).parents[3] / "examples"
R1 = EXAMPLES / "deepseek_r1"
STAGES = read_tree(R1 / "pipeline.yaml")["stages"]
NUMBERS = yaml.safe_load(Path(__file__).with_name("method_numbers.yaml").read_text())
RL = ("r1_zero", "reasoning_rl", "all_scenarios_rl")
R1_ZERO = ("r1_zero", "r1_zero_pools", "r1_zero_fp8")


def recipe(name: str) -> Config:
    return configuration.load_recipe(R1 / f"{name}.yaml")


def num_updates(config: Config) -> int:
    return config.updates_before(config.run.steps + 1)


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: case["source"][:40])
def test_the_recipes_have_the_numbers(case):
    for name in case["recipes"]:
        config = (
            configuration.parse_recipe({"rl": {"preset": "grpo_v1"}})
            if name == "preset"
            else recipe(name)
        )
        found = {key: attrgetter(key)(config) for key in case["numbers"]}
        assert found == case["numbers"], name


@pytest.mark.parametrize("name", sorted({*RL, *R1_ZERO}))
def test_grpo(name):
    config = recipe(name)
    rl = config.rl
    assert not algorithms.find_rules(rl.algorithm).kl_in_reward  # but in the loss
    assert rl.prompts_per_rollout / rl.minibatches == 32  # questions of an optimizer step
    assert rl.prompts_per_rollout * rl.group_size == 8192  # outputs of a rollout
    for _, part in config.schedule_parts():
        size = part.rl.prompts_per_rollout * part.rl.group_size / part.rl.minibatches
        assert size == 512  # sequences of an optimizer step, in every part of the run


@pytest.mark.parametrize("name", R1_ZERO)
def test_r1_zero(name):
    config = recipe(name)
    assert num_updates(config) == 10_400 == num_updates(Config())
    _, (step, after) = config.schedule_parts()
    assert after.rollout.max_response_tokens == 65536
    assert config.updates_before(step) < 8200 <= config.updates_before(step + 1)  # B.4.1


# Section 3: what each stage begins with.
def test_stages_follow_each_other():
    begins = {name: stage["settings"]["model"]["path"] for name, stage in STAGES.items()}
    base = "models/DeepSeek-V3-Base"
    assert begins["r1_zero"] == begins["cold_start_sft"] == begins["sft_800k"] == base
    assert begins["reasoning_rl"] == "${cold_start_sft.hf}"
    assert begins["rejection_sampling"] == "${reasoning_rl.hf}"
    assert begins["helpful_rm"] == begins["safety_rm"] == "${sft_800k.hf}"


# B.3.3, stage 3.
def test_the_800k_samples():
    reasoning, others = recipe("sft_800k").sft.data
    assert (reasoning.count, others.count) == (600_000, 200_000)
    rejection = recipe("rejection_sampling").sample
    assert rejection.samples > 1
    assert {"language", "paragraphs", "code_blocks"} <= rejection.filters.keys()
    assert "judge" in recipe("rejection_sampling").rewards.options  # where no rule exists
    assert "language" in recipe("cold_start_sampling").sample.filters


# Section 3.2.2, stage 4.
def test_rl_for_all_scenarios_is_one_run_whose_last_400_steps_have_preference_rewards():
    config = recipe("all_scenarios_rl")
    assert num_updates(config) == 1_700
    assert {part.rollout.temperature for _, part in config.schedule_parts()} == {0.7}
    general = {"helpful", "safety"}
    drawn = {
        step: {kind for kind in general if part.rl.kind_weights.get(kind, 1) > 0}
        for step, part in config.schedule_parts()
    }
    first = min(step for step, kinds in drawn.items() if kinds)
    assert all(kinds == (general if step >= first else set()) for step, kinds in drawn.items())
    assert config.updates_before(first) + 1 == 1_301
    assert num_updates(config) - config.updates_before(first) == 400
    assert config.rewards.options.keys() == {"language", *general}
    assert STAGES["all_scenarios_rl"]["settings"] == {"model": {"path": "${sft_800k.hf}"}}
    runs = [stage["recipe"] for stage in STAGES.values() if stage["verb"] == "rl"]
    assert runs == [f"{name}.yaml" for name in RL]


# Section 3.1: the reward models.
def test_reward_models():
    assert recipe("helpful_pairs").sample.pairs.margin > 0  # near-ties are dropped
    for name, rows in (("helpful_rm", 66_000), ("safety_rm", 106_000)):
        config = recipe(name)
        held_out = rows * config.reward_model.heldout_fraction
        assert config.run.steps == round((rows - held_out) / 256)  # one epoch


# Section 3 of v1: evaluation.
def test_evaluation():
    config = recipe("evaluation")
    samples = {entry.name: entry.samples for entry in config.eval.benchmarks}
    assert samples.pop("alpaca_eval_2") == 1  # a win rate, no pass@1
    assert samples.keys() == {
        *("aime_2024", "math_500", "gpqa_diamond", "livecodebench", "codeforces", "mmlu")
    }
    assert all(4 <= k <= 64 for k in samples.values()) and max(samples.values()) == 64
    assert config.rewards.options["judge"]["mode"] == "compare"
    with refused("eval.temperature", Cause.OUT_OF_RANGE):  # greedy decoding is not used
        configuration.load_recipe(R1 / "evaluation.yaml", {"eval.temperature": 0})


# Section 4 of v1: SFT alone on the same 800k answers.
def test_students():
    for path in (EXAMPLES / "distill").glob("*.yaml"):
        sft = configuration.load_recipe(path).sft
        assert (sft.data, sft.epochs) == ("data/r1_800k.jsonl", 2) or sft.data == "", path
        assert (sft.data == "") == (path.stem.rpartition("_")[2] in ("rl", "policy")), path


# What published.yaml's tables stand next to.
def test_published_tables():
    published = {
        (table, row): entry["published"].get("accuracy")
        for table, found in read_tree(EXAMPLES / "paper/published.yaml")["tables"].items()
        for row, entry in found["rows"].items()
        if "published" in entry
    }
    numbers = {
        "rewards": {"format": 15, "accuracy": 65, "both": 71},
        "sft_data": {"none": 71.0, "few": 70.5, "many": 50.0, "few_rl": 79.8},
        "small_model": {"rl": 47.0, "distilled": 72.6},
        "votes": {"n1": 79.8, "n16": 87.2},
    }
    for table, rows in numbers.items():
        assert rows.items() <= {row: n for (t, row), n in published.items() if t == table}.items()
