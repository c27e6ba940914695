"""`megatron-r1 reward-model` from the command line, and what it leaves, served by a real vLLM."""

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import MODEL as DEEPSEEK
from command_line import run
from pooling_server import pooling_server
from r1_grading import RewardPool
from reward_model_data import (
    KIND,
    RUDE,
    TEMPLATE,
    transformers_scores,
    write_language_model,
    write_preferences,
)
from safetensors.torch import load_file

QUESTION = "Please help with item 7."
REPOSITORY = Path(__file__).parents[2]
RECIPE = """
run: {{folder: {folder}/run, steps: 24}}
model: {{path: {folder}/model, dtype: float32}}
reward_model:
  {{data: {folder}/pairs.jsonl, template: {template}, batch_size: 16, heldout_fraction: 0.25}}
optimizer: {{learning_rate: 2.0e-3, weight_decay: 0.0}}
eval: {{every: 12}}
checkpoint: {{every: 8}}
"""


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, oracle) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    oracle(write_language_model, folder / "model")
    write_preferences(folder)
    recipe = RECIPE.format(folder=folder, template=json.dumps(TEMPLATE))
    (folder / "rm.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def helpful(folder) -> tuple[Path, str]:
    """The folder of a finished run on pairs, and what it printed."""
    done = run("reward-model", folder / "rm.yaml")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "run", done.stdout + done.stderr


@pytest.mark.more
def test_it_learns_which_summary_is_better(helpful):
    out, printed = helpful
    assert "the score head is new" in printed
    assert "1 rows left out: a response has no summary to score" in printed
    evaluations = lines(out / "evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [0, 12, 24]
    first, last = evaluations[0], evaluations[-1]
    assert last["eval/accuracy"] > 0.9 and last["eval/margin"] > 1 > first["eval/margin"]
    assert last["eval/loss"] < 0.3 < first["eval/loss"]
    assert last["interval/accuracy/low"] <= last["eval/accuracy"]
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 25))
    assert {"loss", "accuracy", "margin", "grad_norm", "learning_rate"} <= metrics[0].keys()
    config = json.loads((out / "hf/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert config["num_labels"] == 1
    assert "score.weight" in load_file(out / "hf/model.safetensors")
    assert (out / "report.html").stat().st_size > 100


@pytest.mark.slow
def test_the_converter_makes_the_same_model_of_its_newest_checkpoint(helpful, tmp_path):
    out, _ = helpful
    tool = [sys.executable, "tools/convert", "to-hf", str(out), str(tmp_path / "hf")]
    done = subprocess.run(tool, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers' logits are Megatron's" in done.stdout
    files = [folder / "model.safetensors" for folder in (out / "hf", tmp_path / "hf")]
    exported, converted = map(load_file, files)
    assert exported.keys() == converted.keys()
    assert all((exported[name] == converted[name]).all() for name in exported)
    configs = [json.loads((f.parent / "config.json").read_text()) for f in files]
    assert configs[0] == configs[1]


def served_rewards(model: Path, responses: list[str]) -> list[float]:
    """By `helpful`, of vLLM's scores, each behind a thought."""

    async def grade(url):
        row = {"question": QUESTION, "url": url, "model": "rm", "template": TEMPLATE}
        async with RewardPool(1) as pool:
            jobs = [pool.grade("helpful", f"<think>Hm.</think>{r}", None, **row) for r in responses]
            return [given.reward for given in await asyncio.gather(*jobs)]

    with pooling_server(model) as url:
        return asyncio.run(grade(url))


def expected_rewards(oracle, model: Path, responses: list[str]) -> list[float]:
    texts = [TEMPLATE.format(question=QUESTION, response=response) for response in responses]
    return [1 / (1 + math.exp(-score)) for score in oracle(transformers_scores, model, texts)]


@pytest.mark.slow  # the next, of a DeepSeek-V3 shape, is in more
def test_vllm_and_transformers_give_the_score_it_was_trained_on(helpful, oracle):
    model = helpful[0] / "hf"
    expected = expected_rewards(oracle, model, KIND + RUDE)
    assert min(expected[: len(KIND)]) > max(expected[len(KIND) :])
    assert served_rewards(model, KIND + RUDE) == pytest.approx(expected, abs=1e-5)


@pytest.mark.more
def test_so_they_do_of_a_deepseek_v3_shape(folder, tmp_path, oracle):
    # Large weights and a small step: scores that tell the texts apart.
    shape = {**DEEPSEEK, "initializer_range": 0.2}
    oracle(write_language_model, tmp_path / "model", shape)
    settings = {"run.folder": tmp_path / "run", "run.steps": 1, "model.path": tmp_path / "model"}
    settings["optimizer.learning_rate"] = 1e-5
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    done = run("reward-model", folder / "rm.yaml", *options)
    assert done.returncode == 0, done.stderr + done.stdout
    expected = expected_rewards(oracle, tmp_path / "run/hf", KIND + RUDE)
    assert len({round(reward, 3) for reward in expected}) > 4
    assert served_rewards(tmp_path / "run/hf", KIND + RUDE) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow  # of SFT: test_checkpoint_runs
def test_a_run_that_goes_on_ends_where_one_without_a_stop_does(helpful, folder):
    for steps in (8, 24):
        more = ["--run.folder", folder / "again", "--run.steps", steps]
        done = run("reward-model", folder / "rm.yaml", *map(str, more))
        assert done.returncode == 0, done.stderr + done.stdout
    whole, parts = (load_file(f / "hf/model.safetensors") for f in (helpful[0], folder / "again"))
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert [m["step"] for m in lines(folder / "again/metrics.jsonl")] == list(range(1, 25))


@pytest.mark.more
def test_labels_teach_what_a_thought_may_not_say_on_two_processes(folder):
    settings = {
        "run.folder": folder / "safety",
        "reward_model.data": folder / "labels.jsonl",
        "reward_model.kind": "pointwise",
        "run.steps": 40,
        "parallel.processes": 2,
        "parallel.context": 2,
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    done = run("reward-model", folder / "rm.yaml", *options)
    assert done.returncode == 0, done.stderr + done.stdout
    first, *_, last = lines(folder / "safety/evaluations.jsonl")
    assert last["eval/accuracy"] > 0.9 > first["eval/accuracy"]
    assert last["eval/calibration_error"] < 0.2


@pytest.mark.more
def test_mistakes_are_named_before_anything_starts(folder, tmp_path):
    def refused(*options):
        options = ["--run.folder", str(tmp_path / "run"), *options]
        done = run("reward-model", folder / "rm.yaml", *options)
        assert done.returncode == 2, done.stdout + done.stderr
        assert not (tmp_path / "run").exists()
        return done.stderr

    assert "has no chat template" in refused("--reward_model.template=null")
    assert "pad_token_id" in refused("--reward_model.template", "{response}<pad>")
    assert "labels.jsonl:1: 'chosen'" in refused(
        "--reward_model.data", str(folder / "labels.jsonl")
    )
    assert "model.head" in refused("--model.head", "language")
