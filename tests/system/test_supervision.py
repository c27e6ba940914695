"""Runs that lose their controller or a trainer rank, or hang: what is kept, said and mended."""

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from command_line import command, environment
from prometheus_client.parser import text_string_to_metric_families
from run_progress import left_behind, wait_for
from waiting import wait_until

from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.controller.rollouts.group_records import CommitRecord, decode

PLANTED = Path(__file__).parent / "planted"
TWO = ["--parallel.processes", "2", "--parallel.tensor", "2"]
NOT_OF_THE_SAMPLES = ("time/", "rewards/", "tokens_per_second", "groups/restored", "/restarts")
NOT_OF_THE_SAMPLES += ("engines/", "checkpoint/", "push/")


def start(
    verb: str, recipe: Path, folder: Path, *more: object, planted: str | None = None
) -> subprocess.Popen:
    """planted: a key of `planted.sitecustomize.PLANTED`."""
    settings = ["--run.folder", folder, *TWO, *more]
    env = environment() | {"OMP_NUM_THREADS": "1"}
    if planted:
        struck = {"PLANTED": planted, "PLANTED_AT": f"{folder}.struck"}
        env |= struck | {"PYTHONPATH": f"{PLANTED}:{env['PYTHONPATH']}"}
    return subprocess.Popen(
        command(verb, recipe, *settings),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def metrics_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line.endswith("}")]


def of_the_samples(line: dict) -> dict:
    """What of a metrics line follows from samples and weights alone."""
    return {k: v for k, v in line.items() if not any(word in k for word in NOT_OF_THE_SAMPLES)}


def ranks_of(folder: Path) -> list[int]:
    """Trainer processes, in the order of their ranks."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            output = Path(os.readlink(entry / "fd/1"))
        except OSError:
            continue
        if output.parent == folder / "logs" and output.name.startswith("trainer_"):
            found[output.stem] = int(entry.name)
    return [found[name] for name in sorted(found)]


def patience_for(finished: Path) -> int:
    """A `run.hang_seconds` that no phase of an honest run reaches on this machine: as many seconds
    as a whole finished run took, or 10."""
    took = (finished / "metrics.jsonl").stat().st_mtime - (finished / "config.yaml").stat().st_mtime
    return max(10, round(took))


def get(folder: Path, path: str) -> str:
    address = (folder / "health_address").read_text().strip()
    with urllib.request.urlopen(address + path) as answer:
        return answer.read().decode()


def records(folder: Path, step: int) -> tuple[list[int], bool]:
    """Positions of the groups in a step's log, and whether it was accepted."""
    found = [decode(r) for r in FramedFile.read(folder / f"sample_log/step_{step:08d}.log")]
    is_accepted = CommitRecord() in found
    return [r.prompt_index for r in found if not isinstance(r, CommitRecord)], is_accepted


@pytest.mark.more
def test_no_finished_sample_is_lost_whoever_is_killed(base, tmp_path):
    """The controller amid a rollout, then a trainer rank: one checkpoint, none before step 4."""
    folder = tmp_path / "run"
    settings = ["--run.steps", 6, "--checkpoint.every", 4, "--eval.every", 0]
    # An engine that makes one group at a time, so that a rollout has a middle.
    settings += ["--rl.prompts_per_rollout", 24, "--rollout.max_num_seqs", 4]
    process = start("rl", base / "rl.yaml", folder, *settings)
    third = folder / "sample_log/step_00000003.log"
    wait_for(process, "in the third rollout", lambda: third.exists() and third.stat().st_size > 4e3)
    process.kill()
    process.wait()
    wait_until(lambda: not left_behind(folder))
    before = metrics_of(folder)
    assert [m["step"] for m in before] == [1, 2] and not any(folder.glob("checkpoints/step_*"))
    kept, is_accepted = records(folder, 3)
    assert 0 < len(kept) < 24 and not is_accepted, f"killed too late or too early: {kept}"
    assert [len(records(folder, step)[0]) for step in (1, 2)] == [24, 24]

    process = start("rl", base / "rl.yaml", folder, *settings)
    wait_for(process, "past step 4", lambda: len(metrics_of(folder)) >= 4)
    replayed = metrics_of(folder)
    assert [m["groups/restored"] for m in replayed[:3]] == [24, 24, len(kept)]
    assert [of_the_samples(m) for m in replayed[:2]] == [of_the_samples(m) for m in before]

    health = json.loads(get(folder, "/health"))
    assert health["status"] == "ok" and health["engines"]["up"] == 1
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "trainer rank 1 was killed by signal 9" in output and "restart 1 of at most 3" in output
    after = metrics_of(folder)
    assert [m["step"] for m in after] == [1, 2, 3, 4, 5, 6]
    assert after[-1]["trainer/restarts"] == 1 and after[-1]["engines/restarts"] == 0
    assert [of_the_samples(m) for m in after[:3]] == [of_the_samples(m) for m in replayed[:3]]
    # Both in float32; weights of another version would differ by more than 0.05, and one of 1,000
    # tokens whose experts are almost equally good by up to 0.6.
    assert max(m["logprob_diff/mean"] for m in after) < 1e-3
    # Of what lies before the checkpoint nothing is left to replay.
    steps = sorted(path.name for path in (folder / "sample_log").iterdir())
    assert steps[0] > "step_00000004.log" or not any(folder.glob("checkpoints/step_00000004"))


@pytest.mark.more  # two waits for a hang, three starts of two ranks
def test_a_stopped_rank_is_named_with_the_collective_and_the_run_ends_or_mends_itself(
    base, tmp_path
):
    folder = tmp_path / "run"
    settings = ["--run.steps", 400, "--checkpoint.every", 10]
    settings += ["--run.hang_seconds", patience_for(base / "base")]
    # At a place where the other one waits for it in a collective, which it does not everywhere.
    process = start("sft", base / "sft.yaml", folder, *settings, planted="stopped_rank")
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert "nothing has moved for" in errors and "continues from the newest checkpoint" in errors
    (report,) = (folder / "logs").glob("hang-*.txt")
    text = report.read_text()
    for told in (errors, text):
        assert "rank 1 does not answer" in told and "is stopped" in told
        assert "rank 0 in " in told and " among ranks 0, 1 (tensor" in told
    assert "rank 0 (tensor 0, context 0, pipeline 0, expert 0, data 0)" in text
    assert "distributed_c10d.py" in text, "the stack of the rank that waits"

    process = start("sft", base / "sft.yaml", folder, *settings, "--run.on_hang", "restart")
    begun = len(metrics_of(folder)) + 3
    begun += -begun % 10 + 3  # far from a checkpoint, in which a hang may last longer
    wait_for(process, "a few steps on", lambda: len(metrics_of(folder)) >= begun)
    os.kill(ranks_of(folder)[1], signal.SIGSTOP)

    def restarts() -> float:
        metrics = text_string_to_metric_families(get(folder, "/metrics"))
        return {m.name: m for m in metrics}["megatron_r1_trainer_restarts"].samples[0].value

    wait_for(process, "killed and restarted", lambda: restarts() == 1)
    here = len(metrics_of(folder))
    wait_for(process, "training again", lambda: len(metrics_of(folder)) > here + 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    after = metrics_of(folder)
    assert [m["step"] for m in after] == list(range(1, len(after) + 1))
    assert after[-1]["trainer/restarts"] == 1
    # One process trained the same first four steps.
    for line, alone in zip(after, metrics_of(base / "base"), strict=False):
        assert line["loss"] == pytest.approx(alone["loss"], abs=1e-4)
