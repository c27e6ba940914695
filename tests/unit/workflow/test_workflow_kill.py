"""kill -9, Ctrl-C, two at once: the same command continues, and nothing is left behind."""

import signal
import subprocess
import sys
import time

import pytest
from liveness import is_alive
from workflow_world import World, processes_naming, wait_until

from megatron_r1.processes.inspection import descendants
from megatron_r1.workflow import manifest

SLOW = """
pipeline: {folder: out}
stages:
  corpus: {verb: make, function: "tiny:count", arguments: {lines: 3}}
  work: {verb: make, function: "tiny:slow", arguments: {source: ${corpus.data.jsonl}, seconds: 60}}
  last: {verb: make, function: "tiny:join", arguments: {sources: [${work.second.txt}]}}
"""
QUICK = ("--stages.work.seconds", "0")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, SLOW)


def end(process):
    """Kill it as the kernel would, and wait until nothing that it started is left."""
    started = descendants(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not any(is_alive(pid) for pid in started), 10)
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
    assert world.record("work")["seconds"] < 50
    assert world.states(capsys, *QUICK) == dict.fromkeys(("corpus", "work", "last"), "done")


def test_kill_9_at_many_moments_ends_with_what_an_undisturbed_run_makes(world, capsys):
    """Each start is killed half as late again as the one before, until one comes through."""
    delay, kills = 0.15, 0
    while True:
        process = world.start(*QUICK)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            end(process)
            kills, delay = kills + 1, delay * 1.5
            continue
        assert process.returncode == 0, process.stdout.read()
        process.stdout.close()
        break
    assert kills
    assert (world.out / "work/first.txt").read_text() == "a0\na1\na2\n"
    assert (world.out / "last/all.txt").read_text() == "done"
    assert world.states(capsys, *QUICK) == dict.fromkeys(("corpus", "work", "last"), "done")
    assert [path.name for path in world.out.glob("*/begun.json")] == []


@pytest.mark.parametrize("moment", ["begin", "finish", "outputs", "rename"])
def test_a_death_around_a_record_loses_nothing(world, capsys, moment, monkeypatch):
    """The process ends before the record of a beginning, of an end, and around its rename."""

    class Death(BaseException):
        pass

    def die(*_, **__):
        raise Death

    targets = {
        "begin": (manifest, "begin"),
        "finish": (manifest, "finish"),
        "outputs": (manifest.fingerprint, "digest_of_outputs"),
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


def test_a_grandchild_that_hides_from_its_parent_goes_too(world, tmp_path):
    """A daemon: another session, its parent gone."""
    (tmp_path / "daemon.py").write_text(
        "import os, subprocess, sys, time\n"
        "def start(folder):\n"
        "    code = 'import time; time.sleep(300)'\n"
        "    mark = '--mark-of-' + folder.resolve().parts[-3]\n"
        "    script = f'setsid {sys.executable} -c \"{code}\" {mark} & '\n"
        "    subprocess.run(['bash', '-c', script])\n"
        "    (folder / 'started').touch()\n"
        "    time.sleep(60)\n"
    )
    world.write("pipeline: {folder: out}\nstages: {d: {verb: make, function: 'daemon:start'}}")
    mark = f"--mark-of-{tmp_path.name}"
    process = world.start()
    wait_until((world.out / "d/started").exists)
    wait_until(lambda: len(processes_naming(mark)) == 1)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not processes_naming(mark), 10)


def test_ctrl_c_stops_and_says_that_the_same_command_continues(world):
    process = world.start()
    wait_until((world.out / "work/first.txt").exists)
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command continues from here" in output and "Traceback" not in output
    assert not any(is_alive(pid) for pid in children)
    assert world.run(*QUICK) == 0
    assert (world.out / "last/all.txt").read_text() == "done"


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
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "saw the file" in output
    assert not (world.out / "j/stop").exists()


def test_one_pipeline_per_folder_at_a_time(world, capsys):
    process = world.start()
    wait_until((world.out / "work/first.txt").exists)
    assert world.run() == 2
    assert f"in use by another run (pid {process.pid}" in capsys.readouterr().err
    assert process.poll() is None
    end(process)
    assert world.run(*QUICK) == 0


def test_a_stage_whose_folder_another_process_holds_is_waited_for(world, capsys, tmp_path):
    """What a killed pipeline had started may take a while to end."""
    (world.out / "work").mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import time\nfrom megatron_r1.reporting.run_folder import RunFolder\n"
         "with RunFolder('out/work'):\n    print('held', flush=True)\n    time.sleep(3)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    began = time.monotonic()
    assert world.run(*QUICK) == 0
    assert "waiting for the process that still works in out/work" in capsys.readouterr().out
    assert holder.wait(10) == 0 and time.monotonic() > began
    holder.stdout.close()
