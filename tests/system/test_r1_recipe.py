"""The laptop's recipe of all of R1, in small: every stage and verb, killed in between."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import command, environment

pytestmark = pytest.mark.more

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples/laptop/r1.yaml"
STUDENT = "qwen_distilled"
RL = ("r1_zero", "reasoning_rl", "r1")
OWN = ("cold_start_data", "rejection_sampling")
SAMPLED = (*OWN, "distillation_data")
# So small a model is right now and then at best: what it says is kept, right or not.
SETTINGS = {
    "corpus.worked": 3000,
    "corpus.mixed": 600,
    "questions.sums_": 40,
    "questions.sisters_": 40,
    "questions.programs_": 40,
    "base.run.steps": 40,
    "base.sft.batch_size": 16,
    "qwen_base.run.steps": 6,
    "helpful.run.steps": 3,
    "safety.run.steps": 3,
    "preferences.data.num_train": 40,
    "judged.data.num_train": 16,
    "helpful.reward_model.heldout_fraction": 0,
    "safety.reward_model.heldout_fraction": 0,
    **{f"{name}.run.steps": 1 for name in RL[:2]},
    "r1.run.steps": 2,
    "r1.rl.schedule": "[{from_step: 2, rl.kind_weights: {}}]",
    **{f"{name}.eval.every": 0 for name in RL},
    **{f"{name}.data.num_heldout": 4 for name in RL[:2]},
    **{f"{name}.rl.prompts_per_rollout": 8 for name in RL},
    **{f"{name}.rl.group_size": 4 for name in RL},
    **{f"{name}.rewards.workers": 1 for name in (*RL, *SAMPLED, "preferences", "judged")},
    **{f"{name}.data.num_train": 24 for name in SAMPLED},
    **{f"{name}.sample.keep.min_accuracy": 0 for name in SAMPLED},
    **{f"{name}.sample.filters.language": False for name in SAMPLED},
    **{f"{name}.sample.filters.format": False for name in SAMPLED},
}


def start(folder: Path, output: Path, until: str) -> subprocess.Popen:
    options = [f"--stages.{key}={value}" for key, value in SETTINGS.items()]
    chosen = [f"--pipeline.folder={folder}", f"--pipeline.until={until}", "--pipeline.jobs=2"]
    with output.open("a") as file:
        return subprocess.Popen(
            command("pipeline", RECIPE, *chosen, *options),
            env=environment() | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def finished(folder: Path) -> dict[str, str]:
    """Stage → when it was done."""
    found = folder.glob("*/stage.json")
    return {path.parent.name: json.loads(path.read_text())["finished"] for path in found}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The pipeline's folder after rejection sampling, and when the stages were done that a kill -9
    did not undo."""
    folder, output = tmp_path_factory.mktemp("r1") / "r1", tmp_path_factory.mktemp("out") / "out"
    process = start(folder, output, "rejection_sampling")
    while "cold_start" not in finished(folder):
        assert process.poll() is None, output.read_text()[-4000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(folder)
    process = start(folder, output, "rejection_sampling")
    assert process.wait() == 0, output.read_text()[-4000:]
    return folder, before


@pytest.fixture(scope="module")
def r1(half):
    """The pipeline's folder at the end of stage 4."""
    folder, _ = half
    process = start(folder, folder.parent / "out", "r1")
    assert process.wait() == 0, (folder.parent / "out").read_text()[-4000:]
    return folder


def test_stages_end_and_none_that_was_done_is_done_again(half):
    folder, before = half
    after = finished(folder)
    assert {"base", "r1_zero", "cold_start", "reasoning_rl", *OWN} <= after.keys()
    assert before and {name: after[name] for name in before} == before
    assert architectures(folder, "reasoning_rl") == ["DeepseekV3ForCausalLM"]


@pytest.mark.slow
def test_every_stage_ends(r1):
    assert {"base", *RL, *OWN, "sft", "helpful", "safety"} <= finished(r1).keys()


@pytest.mark.slow
def test_rewards_of_the_last_part_come_from_the_reward_models(r1):
    folder = r1
    rows = [json.loads(text) for text in (folder / "questions/all.jsonl").open()]
    kinds = {row["question"]: row["kind"] for row in rows}
    assert set(kinds.values()) == {"math", "code", "helpful", "safety"}
    samples = [json.loads(text) for text in (folder / "r1/samples.jsonl").open()]
    drawn = {
        step: {kinds[s["question"]] for s in samples if (s["split"], s["step"]) == ("train", step)}
        for step in (1, 2)
    }
    assert drawn[1] <= {"math", "code"} and drawn[2] & {"helpful", "safety"}
    _, last = [json.loads(text) for text in (folder / "r1/metrics.jsonl").open()]
    assert last["rewards/ungraded"] == 0 and 0 < last["accuracy"] < 1


def architectures(folder: Path, *names: str) -> list[str]:
    """The architecture of each stage's model; each has one."""
    configs = [json.loads((folder / name / "hf/config.json").read_text()) for name in names]
    return [name for config in configs for name in config["architectures"]]


@pytest.mark.slow
def test_reward_models_are_score_models(r1):
    scored = "DeepseekV3ForSequenceClassification"
    found = architectures(r1, "r1", "helpful", "safety")
    assert found == ["DeepseekV3ForCausalLM", scored, scored]


@pytest.mark.slow
def test_the_report_has_a_row_for_every_stage_of_the_paper(r1):
    page = (r1 / "report.html").read_text()
    for title in ("R1-Zero", "Stage 1", "Stage 2", "Stage 3", "Stage 4", "Helpful reward model"):
        assert title in page, title


@pytest.mark.slow
def test_a_student_of_another_architecture_is_distilled_from_it(r1, tmp_path):
    folder = r1
    before = finished(folder)
    assert start(folder, tmp_path / "out", STUDENT).wait() == 0, (tmp_path / "out").read_text()
    after = finished(folder)
    assert {"distillation_data", STUDENT} <= after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert architectures(folder, STUDENT) == ["Qwen2ForCausalLM"]
