"""`megatron-r1 eval` on a model folder and on a checkpoint, with a real engine."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import run

pytestmark = pytest.mark.more


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def write_recipe(folder: Path, model: Path) -> Path:
    file = folder / "eval.yaml"
    file.write_text(
        f"""
run: {{folder: {folder}/out}}
model: {{path: {model}, dtype: float32}}
data: {{template: "{{question}}"}}
rollout: {{max_response_tokens: 16, dtype: float32, max_num_seqs: 32}}
eval:
  samples: 2
  benchmarks:
    - name: gym/chain_sum
      instruction: "{{question}}"
      options:
        questions: 6
        parameters: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}
    - {{name: gym/gcd, limit: 2, samples: 1}}
"""
    )
    return file


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory) -> Path:
    """The folder of a finished evaluation of a run: of the hf/ in it."""
    folder = tmp_path_factory.mktemp("eval")
    done = run("eval", write_recipe(folder, base / "base"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "base/hf" in done.stdout and "pass@1" in done.stdout
    return folder


def test_an_engine_answers_and_every_answer_is_kept(evaluated):
    samples = lines(evaluated / "out/samples.jsonl")
    assert len(samples) == 6 * 2 + 2
    assert all(0 < s["length"] <= 16 for s in samples)
    # 16 tokens is the limit: what is shorter ended by itself.
    assert not any(s["truncated"] for s in samples if s["length"] < 16)
    result = json.loads((evaluated / "out/eval.json").read_text())
    assert result["benchmarks"]["gym/chain_sum"]["counts"]["samples"] == 12
    assert result["versions"]["torch"] and result["settings"]["weights"]
    for name in ("report.html", "eval.png", "questions.jsonl", "config.yaml"):
        assert (evaluated / "out" / name).stat().st_size > 100


def test_a_finished_evaluation_needs_no_engine_and_another_model_is_refused(
    base, evaluated, tmp_path
):
    before = (evaluated / "out/samples.jsonl").read_bytes()
    again = run("eval", evaluated / "eval.yaml")
    assert again.returncode == 0, again.stderr
    assert (evaluated / "out/samples.jsonl").read_bytes() == before
    shutil.copytree(base / "base/hf", tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text('{"top_k": 1}')
    other = run("eval", evaluated / "eval.yaml", "--model.path", tmp_path / "hf")
    assert other.returncode == 2 and "weights:" in other.stderr


def test_a_model_without_weights_is_refused_before_an_engine_starts(base, tmp_path):
    done = run("eval", write_recipe(tmp_path, base / "model"))
    assert done.returncode == 2
    assert f"model.path: {base}/model has neither model.safetensors nor" in done.stderr
    assert not (tmp_path / "out/logs").exists()


@pytest.mark.slow
def test_a_checkpoint_is_exported_first_and_gives_the_same_answers(base, evaluated, tmp_path):
    checkpoint = max((base / "base/checkpoints").glob("step_*"))
    done = run("eval", write_recipe(tmp_path, checkpoint))
    assert done.returncode == 0, done.stderr + done.stdout
    answers = [
        {(s["benchmark"], s["id"], s["index"]): s["response"] for s in lines(samples)}
        for samples in (evaluated / "out/samples.jsonl", tmp_path / "out/samples.jsonl")
    ]
    # The same weights, and each sample's own seed: the same texts.
    assert answers[0] == answers[1]
