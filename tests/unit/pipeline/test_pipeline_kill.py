"""kill -9, Ctrl-C, two at once: the same command continues, and nothing is left behind."""

import itertools
import signal
import subprocess
import sys

import pytest
from liveness import is_alive
from pipeline_world import World, processes_naming, recipe
from refusals import refused
from waiting import wait_until

from megatron_r1.base.errors import Cause
from megatron_r1.base.processes.process_table import descendant_pids
from megatron_r1.pipeline import executor, manifest

SLOW = recipe("slow")
QUICK = ("--stages.work.waits", "false")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, SLOW)


def end(process):
    """Kill it as the kernel would, and wait until nothing that it started is left."""
    started = descendant_pids(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not any(is_alive(pid) for pid in started))
    return started


def test_kill_9_in_the_middle_of_a_stage(world, capsys):
    process = world.start()
    wait_until((world.out / "work/first.txt").exists)
    assert world.states(capsys) == {"corpus": "done", "work": "running", "last": "pending"}
    assert end(process), "it had no children"
    assert processes_naming(str(world.out)) == []
    assert world.states(capsys) == {"corpus": "done", "work": "unfinished", "last": "pending"}
    assert world.run(*QUICK) == 0
    assert world.calls == ["corpus", "work", "work", "last"]
    assert len(world.record("work")["attempts"]) == 2
    assert world.states(capsys, *QUICK) == dict.fromkeys(("corpus", "work", "last"), "done")


@pytest.mark.more
def test_kill_9_at_many_moments_ends_with_what_an_undisturbed_run_makes(world, capsys):
    """Each start comes a bit further than the one before."""
    kills = 0
    for stage, name in itertools.product(("corpus", "work", "last"), ("begun.json", "stage.json")):
        process = world.start(*QUICK)
        made = world.out / stage / name
        wait_until(lambda: made.exists() or process.poll() is not None)  # noqa: B023
        kills += process.poll() is None
        end(process)
    assert kills
    assert world.run(*QUICK) == 0
    assert (world.out / "work/first.txt").read_text() == "a0\na1\na2\n"
    assert (world.out / "last/all.txt").read_text() == "done"
    assert world.states(capsys, *QUICK) == dict.fromkeys(("corpus", "work", "last"), "done")


@pytest.mark.more
@pytest.mark.parametrize("moment", ["begin", "finish", "outputs", "rename"])
def test_a_death_around_a_record_loses_nothing(world, capsys, moment, monkeypatch):
    """The process ends before the record of a beginning, of an end, and around its rename."""

    class Death(BaseException):
        pass

    def die(*_, **__):
        raise Death

    targets = {
        "begin": (manifest, "record_begin"),
        "finish": (manifest, "record_finish"),
        "outputs": (manifest, "digest_of_outputs"),
        "rename": (manifest, "fsync"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*targets[moment], die)
        with pytest.raises(Death):
            world.run(*QUICK)
    before = world.calls
    assert world.run(*QUICK) == 0
    repeated = [] if moment == "rename" or not before else ["corpus"]
    assert world.calls == [*repeated, "corpus", "work", "last"]
    assert world.states(capsys, *QUICK) == dict.fromkeys(("corpus", "work", "last"), "done")


@pytest.mark.more
def test_a_grandchild_that_hides_from_its_parent_goes_too(world, tmp_path):
    """A daemon: another session, its parent gone."""
    (tmp_path / "daemon.py").write_text(
        "import os, subprocess, sys, time\n"
        "def start(folder):\n"
        "    code = 'import time; time.sleep(3600)'\n"
        "    mark = '--mark-of-' + folder.resolve().parts[-3]\n"
        '    script = f\'setsid "{sys.executable}" -c "{code}" {mark} & \'\n'
        "    subprocess.run(['bash', '-c', script])\n"
        "    (folder / 'started').touch()\n"
        "    time.sleep(3600)\n"
    )
    world.write("pipeline: {folder: out}\nstages: {d: {verb: make, function: 'daemon:start'}}")
    mark = f"--mark-of-{tmp_path.name}"
    process = world.start()
    wait_until((world.out / "d/started").exists)
    wait_until(lambda: len(processes_naming(mark)) == 1)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not processes_naming(mark))


@pytest.mark.more
def test_ctrl_c_stops_and_says_that_the_same_command_continues(world):
    process = world.start()
    wait_until((world.out / "work/first.txt").exists)
    children = descendant_pids(process.pid)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130 and "Traceback" not in output
    assert not any(is_alive(pid) for pid in children)
    assert world.run(*QUICK) == 0
    assert (world.out / "last/all.txt").read_text() == "done"


@pytest.mark.more
def test_a_launched_stage_is_asked_by_a_file_first(world):
    """As a batch job that its submitter cannot signal."""
    (world.path / "job.py").write_text(
        "import pathlib, time\n"
        "def work(folder):\n"
        "    (folder / 'begun').touch()\n"
        "    while not (folder / 'stop').exists():\n"
        "        time.sleep(0.02)\n"
        "    print('saw the file')\n"
        "    raise SystemExit(130)\n"
    )
    world.write(
        "pipeline: {folder: out}\n"
        "stages: {j: {verb: make, function: 'job:work', launch: 'env WHO=batch nice -n 1'}}"
    )
    process = world.start()
    wait_until((world.out / "j/begun").exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130 and "saw the file" in output
    assert not (world.out / "j/stop").exists()


@pytest.mark.more
def test_one_pipeline_per_folder_at_a_time(world):
    process = world.start()
    wait_until((world.out / "work/first.txt").exists)
    with refused("run.folder", Cause.BUSY, process.pid):
        world.load()
    assert process.poll() is None
    end(process)
    assert world.run(*QUICK) == 0


@pytest.mark.more
def test_a_stage_whose_folder_another_process_holds_is_waited_for(world, monkeypatch):
    """What a killed pipeline had started may take a while to end."""
    (world.out / "work").mkdir(parents=True)
    program = (
        "from megatron_r1.reporting.run_folder import RunFolder\n"
        "with RunFolder('out/work'):\n    print('held', flush=True)\n    input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
    )
    assert holder.stdout.readline() == "held\n"

    def show(*words):
        if "out/work" in words[-1] and not holder.stdin.closed:
            assert world.calls == ["corpus"]
            holder.communicate("\n")

    monkeypatch.setattr(executor, "_print_with_time", show)
    assert world.run(*QUICK) == 0
    assert holder.returncode == 0
