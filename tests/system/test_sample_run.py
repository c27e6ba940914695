"""`megatron-r1 sample` with a real engine: killed, continued, and learned from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import command, environment, run

pytestmark = pytest.mark.more  # test_r1_recipe has sampling stages, test_sample_runs the rest
NUM_QUESTIONS, NUM_SAMPLES = 100, 3


def lines(path: Path) -> list[dict]:
    """The whole lines there are; a random model writes line separators of other kinds, too."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def key(line: dict) -> tuple[str, int]:
    return line["id"], line["index"]


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    shots = {"question": "8+8=", "response": "<think></think><answer>16</answer>"}
    (folder / "shots.jsonl").write_text(json.dumps(shots) + "\n")
    (folder / "sample.yaml").write_text(
        f"""
run: {{folder: {folder}/out}}
model: {{path: {base}/base, dtype: float32}}
data: {{path: {base}/questions.jsonl, heldout_fraction: 0, template: "Q {{question}}"}}
rollout: {{max_response_tokens: 24, dtype: float32, max_num_seqs: 4}}
rewards: {{workers: 1}}
sample:
  samples: {NUM_SAMPLES}
  shots: {folder}/shots.jsonl
  # A model of four steps: nothing it says has a form.
  filters: {{format: false, truncated: false, language: false}}
  render: {{template: "{{question}}"}}
"""
    )
    return folder / "sample.yaml"


@pytest.fixture(scope="module")
def continued(recipe) -> tuple[list[dict], subprocess.CompletedProcess]:
    """What a kill left, and how the same command went on, its engine on a host that came to it."""
    samples = recipe.parent / "out/samples.jsonl"
    process = subprocess.Popen(
        command("sample", recipe),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(lines(samples)) < 20 and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = lines(samples)
    folder = recipe.parent / "out"
    agent = [sys.executable, "-m", "megatron_r1.engines.fleet.host", "--folder", folder]
    with subprocess.Popen(agent, env=environment(), stdout=subprocess.DEVNULL) as host:
        elsewhere = ("--rollout.placement", "hosts", "--rollout.hosts_address", "127.0.0.1")
        done = run("sample", recipe, *elsewhere)
        assert done.returncode == 0, done.stderr + done.stdout
        assert host.wait() == 0  # told that the sampling is over
    assert "is here, room for engines: 1" in done.stdout
    return left, done


def test_a_killed_command_samples_no_finished_answer_again(recipe, continued):
    left, done = continued
    assert 20 <= len(left) < NUM_QUESTIONS * NUM_SAMPLES, "it was not killed in the middle"
    assert f"{len(left)} of {NUM_QUESTIONS * NUM_SAMPLES} samples graded" in done.stdout
    samples = {key(line): line for line in lines(recipe.parent / "out/samples.jsonl")}
    assert len(samples) == NUM_QUESTIONS * NUM_SAMPLES
    assert len(lines(recipe.parent / "out/samples.jsonl")) == len(samples)
    for line in left:
        assert line.items() <= samples[key(line)].items()
    assert len({line["seed"] for line in samples.values()}) == len(samples)


def test_what_is_kept_is_what_the_reward_calls_right(recipe, continued):
    samples = lines(recipe.parent / "out/samples.jsonl")
    rows = lines(recipe.parent / "out/sft.jsonl")
    kept = [s for s in samples if s["decision"] == "kept"]
    assert rows and len(kept) == len(rows) < len(samples)
    # grader.py: right is an odd number of characters.
    assert all(len(s["response"]) % 2 == 1 for s in kept)
    wrong = [s for s in samples if s["decision"] == "wrong"]
    assert all(len(s["response"]) % 2 == 0 for s in wrong)
    # The question alone: no worked example, no template it was asked in.
    question = {s["id"]: s["question"] for s in samples}
    assert all(row["prompt"] == question[row["id"]] for row in rows)
    result = json.loads((recipe.parent / "out/sample.json").read_text())
    assert result["kept"] == len(rows) and result["responses"] == len(samples)


def test_deciding_again_needs_no_engine(recipe, continued):
    engine_log = recipe.parent / "out/logs/engine-0.log"
    before = engine_log.stat().st_size
    done = run("sample", recipe, "--sample.keep.per_prompt", "1")
    assert done.returncode == 0, done.stderr
    rows = lines(recipe.parent / "out/sft.jsonl")
    assert len(rows) == len({row["id"] for row in rows})
    assert engine_log.stat().st_size == before


@pytest.mark.slow  # test_r1_recipe trains on samples
def test_sft_learns_a_mixture_of_it_for_its_epochs(base, recipe, continued):
    run_folder = recipe.parent / "sft"
    num_kept = len(lines(recipe.parent / "out/sft.jsonl"))
    sft = {
        "data": [
            {"path": str(recipe.parent / "out/sft.jsonl"), "repeat": 1},
            {"path": str(base / "sft.jsonl"), "count": num_kept},
        ],
        "epochs": 2,
        "batch_size": num_kept,
    }
    path = recipe.parent / "sft.yaml"
    path.write_text(
        f"""
run: {{folder: {run_folder}}}
model: {{path: {base}/model, init: random, init_std: 0.1, dtype: float32}}
sft: {json.dumps(sft)}
optimizer: {{learning_rate: 1.0e-3, weight_decay: 0.0}}
"""
    )
    done = run("sft", path)
    assert done.returncode == 0, done.stderr
    # Two epochs of 2 x num_kept examples, num_kept at once.
    assert [m["step"] for m in lines(run_folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (
        f"{num_kept:,} examples of {base}/sft.jsonl (50.0% of an epoch; it has 100)" in done.stdout
    )
