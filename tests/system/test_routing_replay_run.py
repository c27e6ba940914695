"""Routing replay between a real engine and the trainer: RL from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run, write_model

from megatron_r1.why.all_checks import examine_step
from megatron_r1.why.checks.trainer_logprobs import compare_policies
from megatron_r1.why.comparison import EQUAL
from megatron_r1.why.record.examinable_steps import open_run
from megatron_r1.why.record.step_reader import read_step
from megatron_r1.why.update.recomputation import Recomputation

# Enough experts and layers that a bf16 engine sometimes chooses otherwise than the fp32 trainer.
SIZES = {
    "num_hidden_layers": 6,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """For a model of SIZES with random weights; a rollout is one micro-batch, so that the gap with
    and without replay is that of the same tokens."""
    folder = tmp_path_factory.mktemp("replay")
    write_model(folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | SIZES))
    (folder / "sft.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n')
    (folder / "sft.yaml").write_text(
        f"""
run: {{folder: {folder}/base, steps: 1}}
model: {{path: {folder}/model, init: random, init_std: 0.2, dtype: float32}}
sft: {{data: {folder}/sft.jsonl, batch_size: 1}}
optimizer: {{learning_rate: 1.0e-6}}
"""
    )
    questions = [{"question": f"{a}+{b}=", "truth": a + b} for a in range(4) for b in range(4)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "rl.yaml").write_text(
        f"""
run: {{folder: {folder}/rl, steps: 2}}
model: {{path: {folder}/base/hf, dtype: float32}}
data: {{path: {folder}/questions.jsonl, num_heldout: 0, template: "{{question}}"}}
rollout: {{max_response_tokens: 32, max_num_seqs: 64}}
rl: {{prompts_per_rollout: 8, group_size: 8, minibatches: 1, routing_replay: true}}
push: {{probe_tolerance: 1.0}}  # a probe of few tokens, without replay, has had 0.41 in bf16
optimizer: {{learning_rate: 1.0e-3}}
"""
    )
    done = run("sft", folder / "sft.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "rl.yaml"


def metrics_of(recipe: Path, dtype: str) -> list[dict]:
    folder = recipe.parent / dtype
    keep = ("--rl.keep_sample_log", "true", "--checkpoint.keep_every", "1")
    done = run("rl", recipe, "--run.folder", folder, "--rollout.dtype", dtype, *keep)
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert "without routing replay" in (folder / "report.html").read_text()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_replay_closes_the_part_of_a_bf16_engine_s_gap_that_is_routing(recipe):
    for step in metrics_of(recipe, "bfloat16"):
        assert 0.8 < step["routing/agreement"] < 1.0
        assert step["logprob_diff/mean"] < 0.8 * step["logprob_diff/without_replay"]
    why_recomputes_it(recipe.parent / "bfloat16")


def why_recomputes_it(folder: Path) -> None:
    """`megatron-r1 why` recomputes log-probabilities and updates with the engine's experts. With
    settings that do not replay them, the trainer's log-probabilities depart."""
    step = read_step(*open_run(folder), 2)
    by_name = {quantity.name: quantity for quantity in examine_step(step).comparisons}
    names = ("old policy of the trainer", "loss", "grad_norm", "change of the weights")
    assert [str(by_name[name]) for name in names if by_name[name].status != EQUAL] == []
    rl = step.run_config.rl.model_copy(update={"routing_replay": False})
    config = step.run_config.model_copy(update={"rl": rl})
    plain = Recomputation(replace(step, run_config=config))
    (trainer, _) = compare_policies(plain.step, plain)
    assert trainer.differs, str(trainer)


@pytest.mark.more
def test_in_fp32_engine_and_trainer_route_alike(recipe):
    """Also the proof that rows belong to the right tokens and layers, after a weight push too."""
    for step in metrics_of(recipe, "float32"):
        assert step["routing/agreement"] > 0.999
        assert step["logprob_diff/mean"] < 3e-5  # 7e-6 with these large random weights
