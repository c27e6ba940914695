"""Several stages at a time: what may run together does, nothing before what it needs."""

import shutil
import signal
import threading
from pathlib import Path

import pytest
from liveness import is_alive
from pipeline_world import World, processes_naming, recipe
from refusals import refused
from waiting import wait_until

from megatron_r1.base.errors import Cause
from megatron_r1.base.processes.process_table import descendant_pids
from megatron_r1.pipeline.executor import Executor, run_all

PAIR = recipe("pair")
FAILING = recipe("failing")
LINGERING = recipe("lingering")
TWO = "--pipeline.jobs=2"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("meeting.py"), tmp_path)
    return World(tmp_path, PAIR)


@pytest.mark.more
def test_stages_that_need_each_other_s_company_end_and_what_needs_both_comes_last(world, capfd):
    assert world.run(TWO) == 0
    assert (world.out / "both/joined").read_text() == "left right"
    output = capfd.readouterr().out
    assert "  left: waiting for" in output and "  right: waiting for" in output
    assert output.index("both (make) begins") > max(
        output.index("left is done"), output.index("right is done")
    )


@pytest.mark.more
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


@pytest.mark.more
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
    assert "broken on purpose" in output.err
    world.write(PAIR)
    assert world.run(TWO, "--pipeline.rerun") == 0
    assert (world.out / "both/joined").read_text() == "left right"


@pytest.mark.more
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_it_ends_all_that_runs(world, capsys, number):
    world.write(LINGERING)
    process = world.start(TWO)
    wait_until(lambda: all((world.out / name / "here").exists() for name in "ab"))
    assert world.states(capsys) == {"a": "running", "b": "running"}
    started = descendant_pids(process.pid)
    process.send_signal(number)
    output, _ = process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in started))
    assert processes_naming(str(world.out)) == []
    if number == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in output
    assert world.states(capsys) == {"a": "unfinished", "b": "unfinished"}
    shorter = [f"--stages.{name}.arguments.waits=false" for name in "ab"]
    assert world.run(TWO, *shorter) == 0
    assert world.states(capsys, *shorter) == {"a": "done", "b": "done"}


def test_less_than_one_at_a_time_is_refused(world):
    with refused("pipeline.jobs", Cause.OUT_OF_RANGE, 0):
        world.load("--pipeline.jobs=0")


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_more_than_so_many_run_and_none_before_its_needs(jobs):
    needs = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
    running, most, begun, meeting = set(), [], [], threading.Barrier(jobs)

    def work(task):
        assert not running & set(needs[task]) and set(needs[task]) <= set(begun)
        begun.append(task)
        running.add(task)
        most.append(len(running))
        if task in "bc":
            meeting.wait()  # as many as may run next to each other do
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
        meeting.wait()
        raise RuntimeError(task)

    with pytest.raises(RuntimeError) as raised:
        run_all(["a", "b", "c"], lambda _: [], work, 2, lambda error, _: errors.append(str(error)))
    assert {str(raised.value), *errors} == {"a", "b"}
