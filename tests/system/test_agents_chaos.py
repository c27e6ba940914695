"""The interpreter's sandbox, the environments' server and the controller are killed in mid-episode:
what was finished is not lost, failures are no rewards, and statuses are those of docs/agents.md."""

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import command, command_of, environment, members
from lookup_base import ROOT, lines
from r1_grading.sandbox.programs import require_sandbox
from r1_grading.sandbox.requirements import SandboxUnavailable

from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.controller.rollouts.group_records import decode

pytestmark = pytest.mark.slow
GROUP, QUESTIONS, STEPS = 4, 6, 3


class Chaos:
    """A run that is started again and again, always by the same command."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder, self.journal = folder, folder / "journal"
        self.journal.touch()
        options = f"{{journal: {self.journal}, seconds: 0.1}}"
        self._command = command(
            *("rl", ROOT / "examples/agents/lookup.yaml", "--run.folder", folder / "run"),
            *("--model.path", base / "base/hf", "--data.path", base / "rows.jsonl"),
            *("--agents.environment", "sandboxed_lookup:SandboxedLookup"),
            *("--agents.parameters", options, "--agents.call_seconds", 60),
            *("--run.steps", STEPS),
            *("--rl.prompts_per_rollout", QUESTIONS, "--rl.group_size", GROUP),
            *("--rollout.max_num_seqs", 32, "--data.num_heldout", 0, "--checkpoint.every", 1),
        )
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, is_so: Callable[[], object]) -> None:
        while not is_so():
            assert self.process.poll() is None, self.end()
            time.sleep(0.02)

    def end(self) -> str:
        """Wait for the run's end; return its output."""
        return self.process.communicate()[0]

    def noted(self, what: str, begin: int = 0) -> list[int]:
        """Return seeds of the journal's lines `what`, from line `begin`."""
        noted = [line.split() for line in self.journal.read_text().splitlines()[begin:]]
        return [int(seed) for name, seed, _ in noted if name == what]

    def wait_for_a_group(self, step: int) -> None:
        """Wait until the sample log has a group of `step`, and a slow one is being played."""
        self.wait(lambda: len(self.metrics()) == step - 1)

        def is_so() -> bool:
            rewards = Counter(self.noted("reward"))
            slow = {seed for seed in self.noted("call") if seed % 2 and rewards[seed] < GROUP}
            return bool(slow) and self.log(step).exists() and self.log(step).stat().st_size > 0

        self.wait(is_so)

    def log(self, step: int) -> Path:
        return self.folder / f"run/sample_log/step_{step:08d}.log"

    def num_finished(self, step: int) -> int:
        """Return the number of groups that the log of a run that has ended need not repeat."""
        groups = map(decode, FramedFile.read(self.log(step)))
        return sum(not any(each.ungraded_terms for each in group.responses) for group in groups)

    def metrics(self) -> list[dict]:
        return lines(self.folder / "run/metrics.jsonl")


def test_what_is_killed_costs_only_what_was_unfinished(lookup_base, tmp_path):
    try:
        require_sandbox("python")
    except SandboxUnavailable as missing:
        pytest.skip(str(missing))
    chaos = Chaos(lookup_base, tmp_path)

    chaos.start()
    chaos.wait(lambda: any(seed % 2 for seed in chaos.noted("call")))
    for process in members(chaos.process.pid):
        if "-s -S -B -u -c" in command_of(process):
            with contextlib.suppress(ProcessLookupError):  # its sandbox was killed before
                os.kill(process, signal.SIGKILL)
    chaos.wait_for_a_group(2)
    assert chaos.metrics()[0]["episode/tool_errors"] > 0, "a killed interpreter is a tool's error"

    os.kill(server_of(chaos.process.pid), signal.SIGKILL)
    output = chaos.end()
    assert chaos.process.returncode == 1, output
    assert "environment_error" in output and "the environment's process ended" in output
    assert len(chaos.metrics()) == 1 and chaos.num_finished(2) > 0

    chaos.start()
    chaos.wait_for_a_group(3)
    os.killpg(chaos.process.pid, signal.SIGKILL)
    chaos.process.wait()
    num_finished = chaos.num_finished(3)
    assert 0 < num_finished < QUESTIONS
    begin = len(chaos.journal.read_text().splitlines())

    chaos.start()
    output = chaos.end()
    assert chaos.process.returncode == 0, output
    rewards = chaos.noted("reward", begin)
    assert len(rewards) == 1 + (QUESTIONS - num_finished) * GROUP, "the first is the run's check"
    metrics = chaos.metrics()
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert metrics[1]["groups/restored"] > 0 and metrics[2]["groups/restored"] == num_finished
    for line in metrics:
        assert line["episode/status/environment_error"] == 0, f"step {line['step']}: {output}"
        assert line["logprob_diff/max"] < 1e-4


def server_of(run: int) -> int:
    """Return the environments' server; each of its children has one."""
    [server] = [
        process
        for process in members(run)
        if "environment_server serve" in command_of(process)
        and "environment_server serve" not in command_of(parent_of(process))
    ]
    return server


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
