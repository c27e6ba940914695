"""Whole runs of the command line: what they write and export, and what a kill leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from command_line import command, environment, run
from run_progress import left_behind, lines, wait_for, wait_for_step
from waiting import wait_until

from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.controller.rollouts.group_records import CommitRecord, GroupRecord, decode

HERE = Path(__file__).parent
CONTRACT = [
    *("step", "reward/mean", "accuracy", "response_length/mean", "kl", "clip_fraction", "entropy"),
    *("logprob_diff/mean", "logprob_diff/max", "tokens_per_second", "policy_version", "staleness"),
    *("time/rollout", "time/reward", "time/train", "time/push"),
]
PLAIN_VLLM = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="module")
def temporary():
    """A folder for temporary files, of a short name: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def finished(base, temporary) -> Path:
    """The folder of a run that was killed after its first step and started again."""
    folder = base / "rl"
    with tempfile.TemporaryDirectory(prefix="tmp") as killed_run_s:
        process = start(base, folder=folder, steps=3, more={"TMPDIR": killed_run_s})
        wait_for_step(process, folder, 1)
        process.kill()  # of what it has started, nothing else is
        process.wait()
        wait_until(lambda: left_behind(folder) == [])
    # As a crash in the middle of a write would leave it.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "rew')
    done = run("rl", base / "rl.yaml", more={"TMPDIR": str(temporary)})
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.mark.more
def test_after_kill_9_the_same_command_continues(finished):
    first, *_ = lines(finished / "metrics.jsonl")
    assert first["groups/restored"] == 4, "what was sampled before is not sampled again"
    trained = [s["step"] for s in lines(finished / "samples.jsonl") if s["split"] == "train"]
    assert len(set(Counter(trained).values())) == 1, "a sample is there twice, or lost"


def test_no_temporary_file_is_left(finished, temporary):
    # What torch has compiled stays, for the next engine.
    left = [path for path in temporary.rglob("*") if not path.name.startswith("torchinductor_")]
    assert left == []


def test_nobody_but_the_owner_reads_any_file_of_a_run(finished):
    paths = [finished, *finished.rglob("*")]
    names = {path.relative_to(finished).parts[0] for path in paths[1:]}
    assert names >= {"config.yaml", "checkpoints", "hf", "logs", "samples.jsonl", "report.html"}, (
        names
    )
    readable = [f"{path}: {path.stat().st_mode:o}" for path in paths if path.stat().st_mode & 0o077]
    assert readable == []
    assert (finished / "report.html").read_text(encoding="utf-8")  # its owner does


def test_every_step_writes_the_metrics_others_rely_on(finished):
    metrics = lines(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for line in metrics:
        assert not [key for key in CONTRACT if line.get(key) is None]
    assert [m["policy_version"] for m in metrics] == [0, 1, 2]
    assert all(m["staleness"] == 0 for m in metrics)
    assert [e["step"] for e in lines(finished / "evaluations.jsonl")] == [0, 3]
    samples = lines(finished / "samples.jsonl")
    assert sum(s["split"] == "eval" for s in samples) == 2 * 4 * 4
    assert {s["policy_version"] for s in samples if s["split"] == "train"} == {0, 1, 2}
    for name in ("config.yaml", "report.html", "hf/config.json", "hf/tokenizer.json"):
        assert (finished / name).stat().st_size > 100


@pytest.mark.more
def test_a_dry_run_shows_graded_samples_and_writes_nothing(base):
    before = {path for path in base.rglob("*") if path.is_file()}
    done = run("rl", base / "rl.yaml", "--dry-run", "--run.folder", str(base / "dry"))
    assert done.returncode == 0, done.stderr + done.stdout
    *shown, summary = done.stdout.split("\n---")
    assert len(shown) == 11  # the first is what comes before the samples
    assert all("; accuracy" in sample and "format" in sample for sample in shown[1:])
    assert "16 responses to 4 questions: accuracy" in summary and "tokens/s" in summary
    assert "3 steps of 16 responses" in summary and "M parameters" in summary
    assert {path for path in base.rglob("*") if path.is_file()} == before


def test_terms_count_from_their_step_on_and_the_workers_are_measured(finished):
    first, *later = lines(finished / "metrics.jsonl")
    assert "conciseness/mean" not in first and len(later) == 2
    for line in later:
        # 1 - L / 48 for L tokens: linear, so the means agree too.
        assert line["conciseness/mean"] == pytest.approx(1 - line["response_length/mean"] / 48)
    # 16 answers: accuracy and format, then conciseness too; nothing of the evaluations, nor of the
    # groups that the killed run had graded.
    for line, terms in zip((first, *later), (2, 3, 3), strict=True):
        assert line["rewards/graded"] == (4 - line["groups/restored"]) * 4 * terms
        assert (line["rewards/graded"] > 0) <= (0 < line["rewards/busy"] <= 1)
    assert all(line["rewards/timeouts"] == 0 for line in (first, *later))


def test_the_schedule_changes_settings_from_its_step_on(finished):
    metrics = lines(finished / "metrics.jsonl")
    assert [m["learning_rate"] for m in metrics] == [3e-4, 3e-4, 1e-4]
    samples = [s for s in lines(finished / "samples.jsonl") if s["split"] == "train"]
    longest = {step: max(s["length"] for s in samples if s["step"] == step) for step in (1, 2, 3)}
    assert longest[3] <= 12 < min(longest[1], longest[2]) <= 24


def test_pushed_weights_make_engine_and_trainer_agree_while_the_policy_moves(finished):
    metrics = lines(finished / "metrics.jsonl")
    # fp32 on both sides. Old weights in the engine would be off by what the updates change.
    assert max(m["logprob_diff/mean"] for m in metrics) < 1e-5
    assert max(m["logprob_diff/max"] for m in metrics) < 1e-4
    assert metrics[-1]["kl"] > 1e-3


def test_a_finished_run_started_again_says_so_at_once(base, finished):
    done = run("rl", base / "rl.yaml")
    assert done.returncode == 0 and "already finished" in done.stdout


@pytest.mark.more
def test_a_run_killed_before_its_export_makes_it_without_engines(base, finished):
    exported = finished / "hf"
    weights = (exported / "model.safetensors").read_bytes()
    shutil.rmtree(exported)
    logs = {path: path.stat().st_mtime_ns for path in (finished / "logs").rglob("*engine*")}
    done = run("rl", base / "rl.yaml")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "no engines" in done.stdout
    assert (exported / "model.safetensors").read_bytes() == weights
    assert {p: p.stat().st_mtime_ns for p in (finished / "logs").rglob("*engine*")} == logs
    assert [m["step"] for m in lines(finished / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_leaves_no_process_behind(finished):
    assert left_behind(finished) == []


def greedy(tool: str, *arguments: object) -> list[list[int]]:
    with tempfile.TemporaryDirectory(prefix="tmp") as sockets:  # vLLM leaves them behind
        done = subprocess.run(
            [sys.executable, HERE / "greedy.py", tool, *map(str, arguments)],
            env=environment() | PLAIN_VLLM | {"TMPDIR": sockets},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_export_answers_greedily_as_the_trainer_does(finished):
    trainer = greedy("trainer", finished / "config.yaml", finished / "checkpoints/step_00000003")
    assert len({tuple(answer) for answer in trainer}) > 1
    assert greedy("transformers", finished / "hf") == trainer
    assert greedy("vllm", finished / "hf") == trainer


def start(
    base: Path,
    *options: object,
    steps: int = 6,
    folder: Path | None = None,
    more: dict[str, str] | None = None,
) -> subprocess.Popen:
    """more: environment variables."""
    settings = ["--run.folder", folder or base / "killed", "--run.steps", steps, *options]
    return subprocess.Popen(
        command("rl", base / "rl.yaml", *settings),
        env=environment() | (more or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(folder: Path, text: str) -> list[int]:
    """Processes whose command line has `text` and the run's folder or model in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text in words and str(folder.parent) in words and state != "Z":
            found.append(int(entry.name))
    return found


def records(log: Path) -> list:
    return [decode(frame) for frame in FramedFile.read(log)] if log.exists() else []


def versions(folder: Path, step: int) -> list[int]:
    """The policy that made each token in a step's log, which has one number of a response that one
    policy made."""
    logged = records(folder / f"sample_log/step_{step:08d}.log")
    outputs = [out for r in logged if isinstance(r, GroupRecord) for out in r.responses]
    pairs = [(o.policy_versions, np.frombuffer(o.token_ids, np.int32)) for o in outputs]
    made = [np.broadcast_to(np.frombuffer(by, np.int32), tokens.shape) for by, tokens in pairs]
    return np.concatenate(made).tolist()


@pytest.mark.more
@pytest.mark.parametrize("staleness", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batches_are_sampled_ahead_of_training_as_far_as_staleness_lets_them(
    base, tmp_path, staleness
):
    folder, steps = tmp_path / "run", 5
    settings = ["--rl.staleness", staleness, "--rl.importance_cap", 2.0]
    settings += ["--checkpoint.every", steps]  # every step's log is left
    process = start(base, *settings, steps=steps, folder=folder)
    try:
        # The trainer stops before it has anything to train on, so that engines keep version 0; to
        # look for its process then would take a part of that time.
        wait_for(process, "with a trainer", lambda: [*(folder / "logs").glob("trainer_*")])
        wait_for(process, "with a rank", lambda: processes_of(folder, "trainer.rank"))
        [rank] = processes_of(folder, "trainer.rank")
        wait_for(process, "evaluated", (folder / "evaluations.jsonl").exists)
        os.kill(rank, signal.SIGSTOP)
        logs = [folder / f"sample_log/step_{1 + s:08d}.log" for s in range(steps)]
        last = logs[staleness]
        wait_for(
            process,
            "as far ahead as it may be",
            lambda: any(isinstance(record, CommitRecord) for record in records(last)),
        )
        time.sleep(2.0)  # for another batch, which must not begin
        begun = [log.exists() for log in logs]
        assert not lines(folder / "metrics.jsonl"), "stopped too late"
        os.kill(rank, signal.SIGCONT)
        output, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0, errors + output
    assert begun == [s <= staleness for s in range(steps)]
    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    for trained, line in enumerate(metrics):
        made_by = versions(folder, line["step"])
        assert line["policy_version"] == trained
        assert trained - staleness <= min(made_by) <= max(made_by) <= trained
        assert line["staleness"] == pytest.approx(trained - sum(made_by) / len(made_by))
        assert 0 < line["importance"] <= 2.0
    assert [m["staleness"] for m in metrics[: staleness + 1]] == list(range(staleness + 1))
    # Every question is drawn once, though batches overlap.
    state = json.loads((folder / f"checkpoints/step_{steps:08d}/run_state.json").read_text())
    assert state["sampler"]["position"] == steps * 4


@pytest.mark.slow  # five starts; each death by itself: test_supervision, test_checkpoint_runs
def test_whatever_is_killed_the_same_command_continues_and_no_step_is_lost_or_doubled(base):
    folder, steps = base / "killed", 10

    process = start(base, "--run.max_trainer_restarts", "0", steps=steps)
    wait_for_step(process, folder, 1)
    os.kill(processes_of(folder, "trainer.rank")[0], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1 and "trainer rank 0 was killed by signal 9" in errors

    last = len(lines(folder / "metrics.jsonl"))  # the death comes a step later, if not two
    process = start(base, "--rollout.max_restarts", "0", steps=steps)
    wait_for_step(process, folder, last + 1)
    os.kill(processes_of(folder, "engines.plugin.serve")[0], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1 and "engine-0 died: signal SIGKILL" in errors
    assert "Traceback" not in errors

    # With restarts left, which is the default, the run does not end at all.
    last = len(lines(folder / "metrics.jsonl"))
    process = start(base, steps=steps)
    wait_for_step(process, folder, last + 1)
    os.kill(processes_of(folder, "engines.plugin.serve")[0], signal.SIGKILL)
    wait_for_step(process, folder, last + 3)
    assert lines(folder / "metrics.jsonl")[-1]["engines/restarts"] == 1
    process.kill()
    process.wait()
    wait_until(lambda: not left_behind(folder))

    # As a crash in the middle of a write would leave it.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": {steps + 1}, "rew')
    process = start(base, steps=steps)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continuing after step" in output
    assert [m["step"] for m in lines(folder / "metrics.jsonl")] == [*range(1, steps + 1)]
    assert max(m["logprob_diff/max"] for m in lines(folder / "metrics.jsonl")) < 1e-4


@pytest.mark.more
def test_ctrl_c_finishes_the_step_and_the_same_command_goes_on(base):
    folder = base / "killed"  # with ten steps where the test before has run, else without any
    before = len(lines(folder / "metrics.jsonl"))
    process = start(base, steps=before + 3)
    wait_for_step(process, folder, before + 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode in (0, 130)
    assert "Traceback" not in errors
    steps = [m["step"] for m in lines(folder / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
