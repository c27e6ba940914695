"""A first day: a CSV, init, a dry run, a run of two steps, and questions to its model."""

import csv
import os
import pty
import subprocess
import time

import pytest
from command_line import command, environment, run

from megatron_r1 import config as configuration


@pytest.mark.slow
def test_from_a_csv_to_questions_at_the_trained_model(base, tmp_path):
    with (tmp_path / "sums.csv").open("w", newline="") as file:
        rows = [(f"{a}+{b}=", a + b) for a in range(2, 9) for b in range(2, 9)]
        csv.writer(file).writerows([("Task, as the pupil reads it", "Facit"), *rows])
    recipe = tmp_path / "mine.yaml"
    model = base / "base/hf"
    done = run("init", model, tmp_path / "sums.csv", "--out", recipe)
    assert done.returncode == 0, done.stderr
    written = configuration.load(recipe)
    columns = {"question": "Task, as the pupil reads it", "truth": "Facit"}
    assert written.data.columns == columns and written.rewards.answer == "auto"
    short = ["--rollout.max_response_tokens", "16", "--run.folder", str(tmp_path / "run")]
    done = run("rl", recipe, "--dry-run", *short)
    assert done.returncode == 0, done.stderr
    assert "64 responses to 8 questions" in done.stdout
    done = run("rl", recipe, *short, "--run.steps", "2")
    assert done.returncode == 0, done.stderr + done.stdout
    done = run("chat", tmp_path / "run", "--question", "2+3=")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = run(
        "sample", tmp_path / "run", "--sample.samples", "1", "--sample.keep.min_accuracy", "0"
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "run/sampled/sft.jsonl").stat().st_size
    assert len(typed(tmp_path / "run", ["2+3=", "4+4="])) >= 2


def typed(folder, questions: list[str]) -> list[str]:
    """Type questions at a terminal, then Ctrl-D; return the lines of the answers."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command("chat", folder),
        env=environment(),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(terminal)
    for line in process.stderr:
        if "one question a line" in line:
            break
    for question in questions:
        os.write(controller, f"{question}\n".encode())
        time.sleep(1)
    os.write(controller, b"\x04")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.splitlines()
