"""Several stages at a time: what may run together does, nothing before what it needs."""

import signal
import threading
import time

import pytest
from liveness import is_alive
from workflow_world import World, processes_naming, wait_until

from megatron_r1.processes.inspection import descendants
from megatron_r1.workflow.executor import Executor, run_all

MEET = '''
"""Stages that end only if they run beside each other."""
import time
from pathlib import Path


def meet(folder, *, other, seconds=20.0):
    """Wait for the stage `other` to have begun."""
    (folder / "here").write_text("")
    print("waiting for", other)
    deadline = time.monotonic() + seconds
    while not (Path(other) / "here").exists() and not (Path(other) / "stage.json").exists():
        if time.monotonic() > deadline:
            raise RuntimeError("nobody came")
        time.sleep(0.01)


def join(folder, *, sources):
    (folder / "joined").write_text(" ".join(sorted(Path(s).parent.name for s in sources)))


def linger(folder, *, seconds):
    (folder / "here").write_text("")
    time.sleep(seconds)
    (folder / "done").write_text("")


def fail_beside(folder, *, other):
    meet(folder, other=other)
    raise RuntimeError("broken on purpose")


def meet_and_stay(folder, *, other, until, seconds=20.0):
    """Outlast the other's failure, however long its process takes to end."""
    meet(folder, other=other)
    deadline = time.monotonic() + seconds
    while not Path(until).exists():
        if time.monotonic() > deadline:
            raise RuntimeError("no failure was reported")
        time.sleep(0.01)
'''
PAIR = """
pipeline: {folder: out}
stages:
  left: {verb: make, function: "meeting:meet", arguments: {other: "${pipeline.folder}/right"}}
  right: {verb: make, function: "meeting:meet", arguments: {other: "${pipeline.folder}/left"}}
  both:
    verb: make
    function: "meeting:join"
    arguments: {sources: ["${left.here}", "${right.here}"]}
"""
FAILING = """
pipeline: {folder: out}
stages:
  left:
    verb: make
    function: "meeting:fail_beside"
    arguments: {other: "${pipeline.folder}/right"}
  right:
    verb: make
    function: "meeting:meet_and_stay"
    arguments: {other: "${pipeline.folder}/left", until: failed}
  both:
    verb: make
    function: "meeting:join"
    arguments: {sources: ["${left.here}", "${right.here}"]}
"""
LINGERING = """
pipeline: {folder: out}
stages:
  a: {verb: make, function: "meeting:linger", arguments: {seconds: 60}}
  b: {verb: make, function: "meeting:linger", arguments: {seconds: 60}}
"""
TWO = "--pipeline.jobs=2"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meeting.py").write_text(MEET)
    return World(tmp_path, PAIR)


def test_stages_that_need_each_other_s_company_end_and_what_needs_both_comes_last(world, capfd):
    assert world.run(TWO) == 0
    assert (world.out / "both/joined").read_text() == "left right"
    output = capfd.readouterr().out
    assert "  left: waiting for" in output and "  right: waiting for" in output
    assert output.index("both (make) begins") > max(
        output.index("left is done"), output.index("right is done")
    )


def test_the_graphs_of_several_seeds_run_beside_each_other(world):
    world.write(
        """
pipeline: {folder: out}
stages:
  a: {verb: make, function: "meeting:meet", arguments: {other: "${pipeline.folder}/a"}}
  b: {verb: make, function: "meeting:meet", arguments: {other: "out/seed_1/b"}, after: [a]}
"""
    )
    # Seed 0's b waits for seed 1's, which seed 0's own a does not keep from running.
    assert world.run(TWO, "--pipeline.seeds=0,1") == 0
    assert {path.parent.parent.name for path in world.out.glob("*/b/stage.json")} == {
        "seed_0",
        "seed_1",
    }


def test_one_at_a_time_is_the_default(world, capfd):
    assert world.run("--stages.left.arguments.seconds=0.2") == 1
    assert "nobody came" in capfd.readouterr().err
    assert not (world.out / "right").exists()


def test_after_a_failure_what_runs_comes_to_its_end_and_nothing_else_begins(
    world, capfd, monkeypatch
):
    def report_and_note(executor, error, running):
        report_failure(executor, error, running)
        (world.out.parent / "failed").touch()

    report_failure = Executor.report_failure
    monkeypatch.setattr(Executor, "report_failure", report_and_note)
    world.write(FAILING)
    assert world.run(TWO) == 1
    assert (world.out / "right/stage.json").exists()
    assert not (world.out / "both").exists()
    output = capfd.readouterr()
    assert "broken on purpose" in output.err and "no other stage begins" in output.out
    world.write(PAIR)
    assert world.run(TWO, "--pipeline.rerun") == 0
    assert (world.out / "both/joined").read_text() == "left right"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_it_ends_all_that_runs(world, capsys, number):
    world.write(LINGERING)
    process = world.start(TWO)
    wait_until(lambda: all((world.out / name / "here").exists() for name in "ab"))
    assert world.states(capsys) == {"a": "running", "b": "running"}
    started = descendants(process.pid)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    wait_until(lambda: not any(is_alive(pid) for pid in started), 10)
    assert processes_naming(str(world.out)) == []
    if number == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in output
    assert world.states(capsys) == {"a": "unfinished", "b": "unfinished"}
    shorter = [f"--stages.{name}.arguments.seconds=0" for name in "ab"]
    assert world.run(TWO, *shorter) == 0
    assert world.states(capsys, *shorter) == {"a": "done", "b": "done"}


def test_less_than_one_at_a_time_is_refused(world, capsys):
    assert world.run("--pipeline.jobs=0") == 2
    assert "pipeline.jobs" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_more_than_so_many_run_and_none_before_its_needs(jobs):
    needs = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
    running, most, begun = set(), [], []

    def work(task):
        assert not running & set(needs[task]) and set(needs[task]) <= set(begun)
        begun.append(task)
        running.add(task)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(task)

    run_all(list(needs), needs.__getitem__, work, jobs, pytest.fail)
    assert begun[0] == "a" and set(begun[1:3]) == {"b", "c"} and begun[3] == "d"
    assert max(most) == jobs


def test_a_need_that_is_not_among_the_tasks_is_no_need():
    done = []
    run_all(["b"], {"b": ["a"]}.__getitem__, done.append, 1, pytest.fail)
    assert done == ["b"]


def test_a_second_failure_is_reported_too():
    meeting, errors = threading.Barrier(2), []

    def work(task):
        meeting.wait(10)
        raise RuntimeError(task)

    with pytest.raises(RuntimeError) as raised:
        run_all(["a", "b", "c"], lambda _: [], work, 2, lambda error, _: errors.append(str(error)))
    assert {str(raised.value), *errors} == {"a", "b"}
