"""The worker processes: what a response does to its grader never reaches the run."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from liveness import is_alive, wait_until_dead
from r1_grading import Grade, RewardPool
from r1_grading.worker import WorkerProcess
from refusals import refused
from waiting import until

from megatron_r1.base.errors import Cause, RunError

GRADERS = """
import ctypes, os, subprocess, sys
from r1_grading import Grade

def even(response, truth, **entry):
    return Grade(float(int(response) % 2 == 0), f"{os.getpid()} {truth}")

def leave(response, truth, **entry):
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

def leave_once(response, truth, **entry):
    if os.path.exists(truth):
        return Grade(1.0, "second time")
    open(truth, "w").close()
    os._exit(3)

def hang_in_c(response, truth, **entry):
    ctypes.PyDLL(None).pause()  # keeps the interpreter's lock

def start_child(response, truth, **entry):
    return Grade(1.0, str(subprocess.Popen(["sleep", "1000000"]).pid))

def eat_memory(response, truth, **entry):
    return Grade(0.0, str(len(bytearray(8 * 2**30))))

def chatter(response, truth, **entry):
    print("x" * 100_000, flush=True)
    os.write(1, b"not a reply")
    return Grade(1.0, str(sys.stdin.read()))

def fail(response, truth, **entry): raise KeyError("metadata")
def stop(response, truth, **entry): sys.exit(0)
def decline(response, truth, **entry): return Grade.ungraded("no key")
def quote(response, truth, **entry): return Grade(0.0, response)
def confused(response, truth, **entry): return 0.5
def echo(response, truth, **entry): return Grade(1.0, repr((response[:5], truth, entry)))
"""


@pytest.fixture
def graders(tmp_path, monkeypatch):
    (tmp_path / "graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "graders"


def run_in_pool(scenario, **settings):
    """What scenario(pool) returns. No honest grade runs into the limit."""

    async def run():
        async with RewardPool(**{"num_workers": 1, "timeout_seconds": 600.0} | settings) as pool:
            return await scenario(pool)

    return asyncio.run(run())


def test_every_job_gets_its_own_grade_in_whatever_order_workers_finish(graders):
    async def scenario(pool):
        jobs = [pool.grade("graders:even", str(i), i) for i in range(501)]
        return await asyncio.gather(*jobs), pool.snapshot()

    grades, snapshot = run_in_pool(scenario, num_workers=2)
    assert [grade.reward for grade in grades] == [float(i % 2 == 0) for i in range(501)]
    assert [grade.reason.split()[1] for grade in grades] == [str(i) for i in range(501)]
    assert snapshot["graded"] == 501 and snapshot["queued"] == snapshot["running"] == 0


@pytest.mark.more
def test_registered_rewards_work_through_the_pool():
    async def scenario(pool):
        entry = {"question": "4 - 1 =", "answer": "3", "metadata": {}}
        return [
            await pool.grade("math", "<answer>1/2</answer>", 0.5),
            await pool.grade("math", "2</think><answer>12</answer>", 10**30, thought_opened=True),
            await pool.grade("format", "<think></think><answer>3</answer>", None),
            await pool.grade("logic", "<answer>3</answer>", "3", task="chain_sum", entry=entry),
        ]

    grades = run_in_pool(scenario)
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0, 1.0]
    assert str(10**30) in grades[1].reason


def test_a_grader_that_hangs_in_c_is_killed_and_the_next_job_runs(graders):
    async def scenario(pool):
        before = await pool.grade("graders:even", "2", None)
        child = await pool.grade("graders:start_child", "?", None)
        pids = [int(grade.reason.split()[0]) for grade in (before, child)]
        pool.timeout_seconds = 0.5
        hung = asyncio.create_task(pool.grade("graders:hang_in_c", "?", None))
        await asyncio.sleep(0)  # it has its limit
        pool.timeout_seconds = 600.0
        after = [pool.grade("graders:even", str(i), i) for i in range(20)]
        return pids, await hung, await asyncio.gather(*after), pool.snapshot()

    pids, hung, after, snapshot = run_in_pool(scenario)
    assert (hung.reward, hung.is_graded) == (0.0, True) and "0.5" in hung.reason
    assert [grade.reward for grade in after] == [1.0, 0.0] * 10
    assert snapshot["timeouts"] == 1 and snapshot["graded"] == 22
    assert all(map(wait_until_dead, pids))  # the grader, and the process that it started


def test_a_worker_that_dies_costs_one_retry(graders, tmp_path):
    async def scenario(pool):
        once = pool.grade("graders:leave_once", "?", str(tmp_path / "marker"))
        always = pool.grade("graders:leave", "?", None)
        return await asyncio.gather(once, always), pool.snapshot()

    (once, always), snapshot = run_in_pool(scenario)
    assert once == Grade(1.0, "second time")
    assert (always.reward, always.is_graded) == (0.0, True)
    assert "exit status 3" in always.reason and "last words" in always.reason
    assert snapshot["crashes"] == 3 and snapshot["graded"] == 1


def test_memory_is_limited_and_the_worker_replaced(graders):
    async def scenario(pool):
        before = await pool.grade("graders:even", "2", None)
        eaten = await pool.grade("graders:eat_memory", "?", None)
        after = await pool.grade("graders:even", "2", None)
        return before, eaten, after, pool.snapshot()

    before, eaten, after, snapshot = run_in_pool(scenario, memory_limit_bytes=2**30)
    assert (eaten.reward, eaten.is_graded) == (0.0, True) and "1024 MiB" in eaten.reason
    assert before.reason != after.reason and snapshot["out_of_memory"] == 1


def test_what_a_grader_raises_prints_or_returns_stays_its_own(graders):
    async def scenario(pool):
        kinds = ("fail", "stop", "confused", "chatter")
        return [await pool.grade(f"graders:{kind}", "?", None) for kind in kinds], pool.snapshot()

    (failed, stopped, confused, chatter), snapshot = run_in_pool(scenario)
    assert not any(grade.is_graded for grade in (failed, stopped, confused))
    assert all(shown in failed.reason for shown in ("KeyError: 'metadata'", "graders.py:", "'?'"))
    assert "SystemExit: 0" in stopped.reason and "float" in confused.reason
    assert chatter == Grade(1.0, "")
    assert snapshot["errors"] == 3 and snapshot["crashes"] == 0


def test_a_grade_says_itself_whether_it_is_one(graders):
    async def scenario(pool):
        declined = await pool.grade("graders:decline", "?", None)
        quoted = await pool.grade("graders:quote", "cannot be graded: says the response", None)
        return declined, quoted, pool.snapshot()

    declined, quoted, snapshot = run_in_pool(scenario)
    assert declined == Grade.ungraded("no key") and not declined.is_graded
    assert quoted.is_graded and quoted.reward == 0.0
    assert snapshot["errors"] == snapshot["graded"] == 1


def test_a_megabyte_and_broken_unicode_are_just_wrong_answers(graders):
    async def scenario(pool):
        return [
            await pool.grade("format", f"<answer>{'1' * 1_000_000}</answer>", None),
            await pool.grade("graders:echo", "a\ud800b", "t", exact=True),
        ]

    long, surrogate = run_in_pool(scenario)
    assert (long.reward, long.is_graded) == (0.0, True)
    assert surrogate.reason == "('a?b', 't', {'exact': True})"


def test_what_the_user_got_wrong_raises(graders):
    async def scenario(pool):
        nan, inf = float("nan"), float("inf")
        with refused("kind", Cause.UNKNOWN, "'math'"):
            await pool.grade("maths", "?", None)
        for kind in ("no_such_module:grade", "graders:odd"):
            with refused(kind, Cause.FAILED, kind.partition(":")[0]):
                await pool.grade(kind, "?", None)
        with refused("truth", Cause.MALFORMED, "math", "object"):
            await pool.grade("math", "?", object())
        with refused("truth", Cause.MALFORMED, "math", "NaN"):
            await pool.grade("math", "?", nan)
        with refused("tolerance", Cause.MALFORMED, "NaN"):
            await pool.grade("graders:even", "2", None, tolerance=nan)
        with refused("truth", Cause.MALFORMED, "truth.tests.0.result", "Infinity"):
            await pool.grade("code", "?", {"tests": [{"args": [], "result": inf}]})
        return await pool.grade("graders:even", "2", None)

    assert run_in_pool(scenario).reward == 1.0


def test_settings_that_cannot_work_are_refused():
    with refused("rewards.workers", Cause.OUT_OF_RANGE, 0):
        RewardPool(num_workers=0)
    with refused("rewards.timeout_seconds", Cause.OUT_OF_RANGE, 0):
        RewardPool(timeout_seconds=0)


def test_workers_that_cannot_start_say_so_instead_of_trying_for_ever(monkeypatch):
    async def scenario(pool):
        for _ in range(2):
            with pytest.raises(RunError, match=str(2**31)):
                await pool.grade("math", "<answer>13</answer>", 13)

    monkeypatch.setattr(sys, "executable", "/bin/false")
    run_in_pool(scenario)


def test_a_grader_that_cannot_be_imported_is_an_error_and_not_a_grade(graders, tmp_path):
    (tmp_path / "fragile.py").write_text("import os; os._exit(5)")

    async def scenario(pool):
        with refused("fragile:grade", Cause.FAILED, 5):
            await pool.grade("fragile:grade", "?", None)

    run_in_pool(scenario)


def test_a_memory_limit_too_small_for_the_grader_is_an_error_and_not_a_grade():
    async def scenario(pool):
        with refused("rewards.memory_gib", Cause.OUT_OF_RANGE, "60,000,000"):
            await pool.grade("math", "<answer>13</answer>", 13)

    run_in_pool(scenario, memory_limit_bytes=60_000_000)


def test_a_small_memory_limit_is_named_only_where_memory_is_what_failed(graders, tmp_path):
    (tmp_path / "misspelt.py").write_text("import no_such_library")
    (tmp_path / "loud.py").write_text("import os; os.write(2, b'no licence'); os._exit(5)")
    (tmp_path / "silent.py").write_text("import os; os._exit(5)")
    (tmp_path / "unmapped.py").write_text(
        "raise ImportError('x.so: failed to map segment from shared object')"
    )
    (tmp_path / "lost.py").write_text(
        "raise SystemError('<function f> returned NULL without setting an exception')"
    )
    (tmp_path / "unset.py").write_text("raise SystemError('error return without exception set')")

    async def scenario(pool):
        for module, shown in (("misspelt", "no_such_library"), ("loud", "no licence")):
            with refused(f"{module}:grade", Cause.FAILED, shown):
                await pool.grade(f"{module}:grade", "?", None)
        for module in ("silent", "unmapped", "lost", "unset"):
            with refused("rewards.memory_gib", Cause.OUT_OF_RANGE, "400,000,000"):
                await pool.grade(f"{module}:grade", "?", None)

    run_in_pool(scenario, memory_limit_bytes=400_000_000)


def test_a_caller_that_gives_up_leaves_the_pool_working(graders):
    async def scenario(pool):
        jobs = [asyncio.create_task(pool.grade("graders:even", "2", i)) for i in range(50)]
        await asyncio.sleep(0)
        for job in jobs:
            job.cancel()
        return await pool.grade("graders:even", "2", None)

    assert run_in_pool(scenario).reward == 1.0


def test_closing_ends_workers_and_waiting_jobs(graders):
    async def run():
        pool = RewardPool(1, timeout_seconds=600.0)
        first = await pool.grade("graders:even", "2", None)
        hung = asyncio.create_task(pool.grade("graders:hang_in_c", "?", None))
        await until(lambda: pool.snapshot()["running"])
        await pool.close()
        with pytest.raises(RunError):
            await hung
        with pytest.raises(RunError):
            await pool.grade("math", "13", 13)
        await pool.close()
        return int(first.reason.split()[0])

    assert not is_alive(asyncio.run(run()))


def test_workers_die_with_a_killed_parent(graders, tmp_path):
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(
            """
            import asyncio, os
            from r1_grading.pool import RewardPool

            async def main():
                pool = RewardPool(1, timeout_seconds=600)
                grade = await pool.grade("graders:even", "2", None)
                print(grade.reason.split()[0], flush=True)
                await pool.grade("graders:hang_in_c", "2", None)

            asyncio.run(main())
            """
        )
    )
    with subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE) as process:
        worker_pid = int(process.stdout.readline())
        assert is_alive(worker_pid)
        process.send_signal(signal.SIGKILL)
    assert wait_until_dead(worker_pid)


def test_a_worker_stands_in_a_process_group_of_its_own():
    async def run():
        worker = await WorkerProcess.start(2**31)
        group = os.getpgid(worker.process.pid)
        status = await worker.kill()
        return worker.process.pid == group != os.getpgid(0), status

    assert asyncio.run(run()) == (True, -signal.SIGKILL)
