"""A pipeline of real stages: a function makes a corpus, sft trains on it twice, vLLM serves the
result while eval asks it. Killed in between, continued, left stale."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import command, environment, run, write_model
from safetensors.torch import load_file

RECIPE = """
pipeline: {folder: FOLDER/out, seed: 5}
defaults:
  model: {dtype: float32}
  optimizer: {learning_rate: 1.0e-3, weight_decay: 0.0}
  rollout: {max_response_tokens: 12, dtype: float32}
stages:
  corpus: {verb: make, function: "pipeline_corpus:write", arguments: {digits: 8}}
  base:
    verb: sft
    recipe: base.yaml
    settings: {sft: {data: ${corpus.sft.jsonl}}}
  longer:
    verb: sft
    settings:
      run: {steps: 2}
      model: {path: ${base.hf}}
      sft: {data: ${corpus}/sft.jsonl, batch_size: 16}
  scores:
    verb: eval
    evaluates: longer
    serve:
      policy: {model: ${longer.hf}, arguments: [--dtype, float32, --max-model-len, 128]}
    settings:
      data: {template: "{question}"}
      eval:
        samples: 2
        server: {url: ${serve.policy.url}, model: policy, api: completions}
        benchmarks:
          - {name: gym/chain_sum, instruction: "{question}", options: {questions: 6}}
"""
pytestmark = pytest.mark.more  # the rules alone: tests/unit/pipeline; R1's graph: test_r1_recipe

STAGES = ("corpus", "base", "longer", "scores")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def weights(hf_folder: Path) -> dict:
    return {k: v for path in hf_folder.glob("*.safetensors") for k, v in load_file(path).items()}


def pipeline(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return run("pipeline", folder / "r1.yaml", *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a pipeline that was killed in its second stage and continued to its end."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder / "model")
    (folder / "r1.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    (folder / "base.yaml").write_text(
        f"run: {{steps: 8}}\nsft: {{batch_size: 16}}\n"
        f"model: {{path: {folder}/model, init: random, init_std: 0.1}}\n"
    )
    with (folder / "first.log").open("w") as log:
        process = subprocess.Popen(
            command("pipeline", folder / "r1.yaml"), env=environment(), stdout=log, stderr=log
        )
        while not list((folder / "out/base/checkpoints").glob("step_0*")):
            assert process.poll() is None, (folder / "first.log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "out/base/stage.json").exists()
    done = pipeline(folder)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "base (sft) continues" in done.stdout
    return folder


def test_every_stage_is_done_and_says_what_it_was_made_of(finished):
    out = finished / "out"
    made = {name: json.loads((out / name / "stage.json").read_text()) for name in STAGES}
    assert [line["step"] for line in metrics(out / "base")] == list(range(1, 9))
    assert len(made["base"]["attempts"]) == 2 and len(made["longer"]["attempts"]) == 1
    assert made["longer"]["inputs"]["${base.hf}"] == made["base"]["outputs"]["hf"]
    assert made["scores"]["inputs"]["${longer.hf}"] == made["longer"]["outputs"]["hf"]
    assert f"model.path {finished}/model" in made["base"]["inputs"]
    assert made["base"]["settings"]["run.seed"] == 5
    assert made["base"]["settings"]["optimizer.learning_rate"] == 1e-3


def test_the_second_training_began_with_the_first_ones_weights(finished):
    base, longer = (weights(finished / f"out/{name}/hf") for name in ("base", "longer"))
    assert base.keys() == longer.keys()
    # Two steps of AdamW at 1e-3 move no weight by more than about 2e-3; another random start would.
    moved = [(base[name] - longer[name]).abs().max().item() for name in base]
    assert 0 < max(moved) < 5e-3
    first, again = metrics(finished / "out/base"), metrics(finished / "out/longer")
    assert again[0]["loss"] < first[0]["loss"]


def test_a_served_model_was_evaluated_and_stands_in_the_report(finished):
    result = json.loads((finished / "out/scores/eval.json").read_text())
    assert result["benchmarks"]["gym/chain_sum"]["counts"]["samples"] == 12
    report = json.loads((finished / "out/report.json").read_text())
    assert report["stages"]["scores"]["evaluates"] == "longer"
    accuracy = report["stages"]["longer"]["by_seed"]["5"]["figures"]["accuracy"]
    expected = result["benchmarks"]["gym/chain_sum"]["metrics"]["pass@1"]
    assert {key: accuracy[key] for key in expected} == expected
    losses = [line["loss"] for line in metrics(finished / "out/base")]
    loss = report["stages"]["base"]["by_seed"]["5"]["figures"]["loss"]["value"]
    assert loss == pytest.approx(losses[-1])
    page = (finished / "out/report.html").read_text()
    assert page.count("<rect") >= len(STAGES) and "held" not in report["title"]


def test_a_finished_pipeline_runs_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "out").glob("*/*")}
    again = pipeline(finished)
    assert again.returncode == 0, again.stderr
    names = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("done")]
    assert names == list(STAGES)
    logs = {path for path in before if path.parent.name == "logs"}
    after = {path: path.stat().st_mtime_ns for path in (finished / "out").glob("*/*")}
    assert {p: t for p, t in after.items() if p not in logs} == {
        p: t for p, t in before.items() if p not in logs
    }


def test_a_changed_setting_makes_the_rest_stale(finished):
    change = ("--stages.longer.run.steps", "3")
    status = pipeline(finished, "--pipeline.status", "true", *change)
    states = [line.split()[:2] for line in status.stdout.splitlines() if line[:1] not in (" ", "/")]
    assert states == [
        ["done", "corpus"],
        ["done", "base"],
        ["stale", "longer"],
        ["stale", "scores"],
    ]
    assert "run.steps: 2 then, 3 now" in status.stdout
    refused = pipeline(finished, *change)
    assert refused.returncode == 2 and "--pipeline.rerun true" in refused.stderr
