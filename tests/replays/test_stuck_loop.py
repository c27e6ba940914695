"""An asynchronous loop that waits for a sample which never comes.

NovaSky-AI/SkyRL#1173: a few generation tasks ended without a result; the trainer waited for the
last 1 to 3 of a batch of 128 without a limit, for 29 hours, in three runs of three, without an
error. NVIDIA-NeMo/RL#3488: the collector of samples had died; the trainer polled an empty buffer
for 3.7 hours on 64 nodes, until its time in Slurm was over.

Here one request of the second step never returns, with batches sampled ahead of training.
"""

import re

import pytest

SECONDS = 15
STUCK = ["--rl.staleness", 1, "--rl.importance_cap", 2.0, "--run.hang_seconds", SECONDS]
NAMED = "Everything waits for engines: 1 groups are not back"


@pytest.mark.more  # two starts, and the wait
def test_the_run_ends_with_who_waits_for_whom_and_goes_on_without_the_fault(replay):
    ended = replay.run("lost_request", NAMED, *STUCK)
    assert ended.returncode == 1 and ended.seconds is not None, ended.printed
    (quiet,) = set(re.findall(r"nothing has moved for (\d+) s", ended.printed))
    assert int(quiet) >= SECONDS  # and as much more as the watchdog's wake-ups were late
    assert "engine-0: " in ended.printed and "its core answers" in ended.printed
    done = [line["step"] for line in ended.metrics]
    assert done == [1]
    (report,) = (ended.folder / "logs").glob("hang-*.txt")
    assert "oldest group: grader:grade question" in report.read_text()

    again = replay.run(None, "finished", *STUCK)
    assert again.returncode == 0, again.printed
    assert [line["step"] for line in again.metrics] == [1, 2, 3, 4]
    assert again.metrics[1]["groups/restored"] == 3, "the groups that had come back"
