"""The numbers of DeepSeek-R1's method, as literals, against the recipes that ship.

Sections are those of arXiv 2501.12948, v2 unless said otherwise. Steps of the paper are optimizer
steps; a recipe's are rollouts of 16."""

from pathlib import Path

import pytest

from megatron_r1 import config as configuration
from megatron_r1.config import Config, algorithms
from megatron_r1.data.templates import render
from megatron_r1.errors import UserError
from megatron_r1.workflow.pipeline_recipe import read_tree

EXAMPLES = Path(__file__).parents[3] / "examples"
R1 = EXAMPLES / "deepseek_r1"
STAGES = read_tree(R1 / "pipeline.yaml")["stages"]
RL = ("r1_zero", "reasoning_rl", "all_scenarios_rl")


def recipe(name: str) -> Config:
    return configuration.load(R1 / f"{name}.yaml")


def num_updates(config: Config) -> int:
    return config.updates_before(config.run.steps + 1)


# Section 2 and B.4.1: R1-Zero; section 3.2: "most parameters" of the later stages are the same.
@pytest.mark.parametrize("name", RL)
def test_grpo(name):
    config = recipe(name)
    rl, optimizer = config.rl, config.optimizer
    assert rl.algorithm == "grpo"
    assert rl.advantage_std == "group"  # equation 3
    assert rl.kl_estimator == "k3"  # equation 2
    assert optimizer.learning_rate == 3e-6
    assert optimizer.decay == "constant"
    assert (rl.clip_low, rl.clip_high) == (10, 10)
    assert rl.kl_beta == 0.001
    assert not algorithms.rules_of(rl.algorithm).kl_in_reward  # but in the loss
    assert rl.group_size == 16
    assert rl.questions_per_rollout / rl.minibatches == 32  # questions of an optimizer step
    assert rl.questions_per_rollout * rl.group_size == 8192  # outputs of a rollout
    assert rl.minibatches == 16
    assert rl.reference_refresh == 400
    assert config.rollout.max_response_tokens == 32768
    # B.1: the MTP layer drafts, of which DeepSeek-V3 has one; the number of tokens is not given.
    assert vars(config.rollout.speculative) == {"method": "mtp", "tokens": 1}
    # DeepSeek-V3's AdamW (arXiv 2412.19437, section 4.2).
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    # B.1: about 2,000 GPUs, which rollout and training use in turn; the reference waits elsewhere.
    assert (config.parallel.processes, config.rollout.colocated) == (2048, True)
    assert config.parallel.reference_offload == "host"
    for _, phase in config.phases():
        size = phase.rl.questions_per_rollout * phase.rl.group_size / phase.rl.minibatches
        assert size == 512  # sequences of an optimizer step, in every part of the run


def test_r1_zero():
    config = recipe("r1_zero")
    assert num_updates(config) == 10_400
    assert config.rollout.temperature == 1.0
    _, (step, after) = config.phases()
    assert after.rollout.max_response_tokens == 65536
    assert config.updates_before(step) < 8200 <= config.updates_before(step + 1)  # B.4.1
    assert config.rewards.weights == {"accuracy": 1.0, "format": 0.1}
    # Table 1.
    text = render(config.data.template, "1 + 1?")
    assert text.startswith("A conversation between User and Assistant. The User asks a question")
    assert "solves it. The Assistant first thinks about the reasoning process and then" in text
    assert "enclosed within <think> </think> and <answer> </answer> tags" in text
    assert text.endswith("User: 1 + 1?\nAssistant:")


# v1, as its reviews have it.
def test_the_preset_grpo_v1(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("rl: {preset: grpo_v1}\n")
    config = configuration.load(file)
    rl = config.rl
    assert (rl.clip_low, rl.clip_high, rl.kl_beta, rl.group_size) == (0.2, 0.2, 0.04, 64)
    assert rl.reference_refresh == 0  # the reference is frozen
    assert (config.optimizer.learning_rate, config.rollout.temperature) == (3e-6, 1.0)
    assert (config.rollout.max_response_tokens, num_updates(config)) == (32768, 10_400)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)


# Section 3: what each stage begins with.
def test_stages_follow_each_other():
    begins = {name: stage["settings"]["model"]["path"] for name, stage in STAGES.items()}
    base = "models/DeepSeek-V3-Base"
    assert begins["r1_zero"] == begins["cold_start_sft"] == begins["sft_800k"] == base
    assert begins["reasoning_rl"] == "${cold_start_sft.hf}"
    assert begins["rejection_sampling"] == "${reasoning_rl.hf}"
    assert begins["helpful_rm"] == begins["safety_rm"] == "${sft_800k.hf}"


# Section 3, stage 1: a few thousand examples.
def test_the_cold_start():
    sampling = recipe("cold_start_sampling")
    assert (sampling.data.num_train, sampling.sample.keep.per_prompt) == (5000, 1)
    assert sampling.sample.filters.keys() >= {"language"}


# Section 3, stage 1. The learning rate is v1's; B.4.2 decays to it from ten times as much.
@pytest.mark.parametrize("name", ["cold_start_sft", "sft_800k"])
def test_both_sft_stages(name):
    config = recipe(name)
    assert config.optimizer.learning_rate == 5e-6
    assert config.optimizer.decay == "constant"
    assert config.sft.epochs == 2
    assert config.sft.batch_size == 128  # B.4.2
    assert config.rollout.max_response_tokens == 32768  # B.4.2
    assert "5.0e-6             # v1" in (R1 / f"{name}.yaml").read_text()  # its source is cited


# Section 3.2.1, stage 2.
def test_reasoning_rl():
    config = recipe("reasoning_rl")
    assert config.rollout.temperature == 1.0
    # Equation 7: the language reward is "directly added".
    assert config.rewards.weights == {"accuracy": 1.0, "format": 0.1, "language": 1.0}


# B.3.3, stage 3.
def test_the_800k_samples():
    reasoning, others = recipe("sft_800k").sft.data
    assert (reasoning.count, others.count) == (600_000, 200_000)
    rejection = recipe("rejection_sampling").sample
    assert rejection.keep.min_accuracy == 1.0
    assert rejection.samples > 1
    assert {"language", "paragraphs", "code_blocks"} <= rejection.filters.keys()
    assert "judge" in recipe("rejection_sampling").rewards.options  # where no rule exists


# Section 3.2.2, stage 4.
def test_rl_for_all_scenarios_is_one_run_whose_last_400_steps_have_preference_rewards():
    config = recipe("all_scenarios_rl")
    assert num_updates(config) == 1_700
    assert {phase.rollout.temperature for _, phase in config.phases()} == {0.7}
    general = {"helpful", "safety"}
    drawn = {
        step: {kind for kind in general if phase.rl.kind_weights.get(kind, 1) > 0}
        for step, phase in config.phases()
    }
    first = min(step for step, kinds in drawn.items() if kinds)
    assert all(kinds == (general if step >= first else set()) for step, kinds in drawn.items())
    assert config.updates_before(first) + 1 == 1_301
    assert num_updates(config) - config.updates_before(first) == 400
    assert config.rewards.weights == {"accuracy": 1.0, "format": 0.1, "language": 1.0}
    assert config.rewards.options.keys() == {"language", *general}
    assert STAGES["all_scenarios_rl"]["settings"] == {"model": {"path": "${sft_800k.hf}"}}
    runs = [stage["recipe"] for stage in STAGES.values() if stage["verb"] == "rl"]
    assert runs == [f"{name}.yaml" for name in RL]


# Section 3.1: the reward models.
def test_reward_models():
    pairs = recipe("helpful_pairs").sample
    assert (pairs.samples, pairs.pairs.votes, pairs.pairs.part) == (2, 4, "summary")
    assert pairs.pairs.margin > 0  # near-ties are dropped
    assert recipe("safety_labels").data.num_train == 106_000
    for name, rows, kind, part in (
        ("helpful_rm", 66_000, "pairwise", "summary"),
        ("safety_rm", 106_000, "pointwise", "response"),
    ):
        config = recipe(name)
        rm = config.reward_model
        assert (rm.kind, rm.shown, rm.batch_size, rm.max_tokens) == (kind, part, 256, 8192)
        assert config.optimizer.learning_rate == 6e-6
        held_out = rows * rm.heldout_fraction
        assert config.run.steps == round((rows - held_out) / 256)  # one epoch


# Section 3 of v1: evaluation.
def test_evaluation():
    config = recipe("evaluation")
    assert (config.eval.temperature, config.eval.top_p) == (0.6, 0.95)
    assert config.rollout.max_response_tokens == 32768
    samples = {entry.name: entry.samples for entry in config.eval.benchmarks}
    assert samples.pop("alpaca_eval_2") == 1  # a win rate, no pass@1
    assert samples.keys() == {
        *("aime_2024", "math_500", "gpqa_diamond", "livecodebench", "codeforces", "mmlu")
    }
    assert all(4 <= k <= 64 for k in samples.values()) and max(samples.values()) == 64
    assert config.rewards.options["judge"]["mode"] == "compare"
    with pytest.raises(UserError, match=r"eval\.temperature"):  # greedy decoding is not used
        configuration.load(R1 / "evaluation.yaml", {"eval.temperature": 0})


# What users compare their own figures with: table 4 of v1, R1.
def test_figures_beside_the_benchmarks():
    text = (R1 / "evaluation.yaml").read_text()
    for name, figure in {
        "aime_2024": "79.8, of 16: 87.2",
        "math_500": "97.3",
        "gpqa_diamond": "71.5",
        "livecodebench": "65.9",
        "codeforces": "a rating of 2029 from contests, which is not measured here",
        "mmlu": "90.8",
        "alpaca_eval_2": "87.6",
    }.items():
        [line] = [line for line in text.splitlines() if f"name: {name}," in line]
        assert line.endswith(f" R1: {figure}"), line


# Section 4 of v1: SFT alone on the same 800k answers, and AIME 2024 pass@1.
@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("qwen2.5-math-1.5b", 28.9),
        ("qwen2.5-math-7b", 55.5),
        ("qwen2.5-14b", 69.7),
        ("qwen2.5-32b", 72.6),
        ("llama-3.1-8b", 50.4),
        ("llama-3.3-70b-instruct", 70.0),
        ("qwen2.5-32b_rl", 47.0),
    ],
)
def test_students(name, figure):
    path = EXAMPLES / f"distill/{name}.yaml"
    config = configuration.load(path)
    assert f"AIME 2024 pass@1 {figure}" in path.read_text()
    assert (config.sft.data == "") == name.endswith("_rl")
    if config.sft.data:
        assert (config.sft.data, config.sft.epochs) == ("data/r1_800k.jsonl", 2)


# What published.yaml's tables stand beside.
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
