"""The worker processes: what a response does to its grader never reaches the run."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from liveness import is_alive, wait_until_dead

from megatron_r1.rewards import Grade
from megatron_r1.rewards.runtime.pool import RewardPool
from megatron_r1.rewards.runtime.process import WorkerProcess

GRADERS = """
import os, sys, time
from megatron_r1.rewards import Grade

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
    os.write(os.open(truth, os.O_CREAT | os.O_WRONLY), str(os.getpid()).encode())
    return Grade(0.0, str(len(str(9**9**9))))

def start_child(response, truth, **entry):
    import subprocess
    child = subprocess.Popen(["sleep", "600"])
    open(truth, "w").write(str(child.pid))
    time.sleep(600)

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
    async def run():
        async with RewardPool(**{"num_workers": 1, "timeout_seconds": 20.0} | settings) as pool:
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


def test_registered_rewards_work_through_the_pool():
    async def scenario(pool):
        entry = {"question": "4 - 1 =", "answer": "3", "metadata": {}}
        return [
            await pool.grade("math", "<answer>1/2</answer>", 0.5),
            await pool.grade("math", "2</think><answer>12</answer>", 10**30, opened=True),
            await pool.grade("format", "<think></think><answer>3</answer>", None),
            await pool.grade("logic", "<answer>3</answer>", "3", task="chain_sum", entry=entry),
        ]

    grades = run_in_pool(scenario)
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0, 1.0]
    assert grades[1].reason == f"wrong: 12, expected {10**30}"


def test_a_grader_that_hangs_in_c_is_killed_and_the_next_job_runs(graders, tmp_path):
    async def scenario(pool):
        await pool.grade("graders:even", "2", None)
        hung = pool.grade("graders:hang_in_c", "?", str(tmp_path / "pid"))
        after = [pool.grade("graders:even", str(i), i) for i in range(20)]
        return await asyncio.gather(hung, *after), pool.snapshot()

    (hung, *after), snapshot = run_in_pool(scenario, timeout_seconds=1.5)
    assert hung == Grade(0.0, "timed out after 1.5 s")
    assert [grade.reward for grade in after] == [1.0, 0.0] * 10
    assert snapshot["timeouts"] == 1 and snapshot["graded"] == 21
    assert wait_until_dead(int((tmp_path / "pid").read_text()))


def test_the_processes_a_grader_started_die_with_it(graders, tmp_path):
    async def scenario(pool):
        return await pool.grade("graders:start_child", "?", str(tmp_path / "pid"))

    assert "timed out" in run_in_pool(scenario, timeout_seconds=1.0).reason
    assert wait_until_dead(int((tmp_path / "pid").read_text()))


def test_a_tower_of_powers_costs_one_time_limit():
    async def scenario(pool):
        towers = ("9**9**9**9", "9^{9^{9^{9}}}")
        jobs = [pool.grade("math", f"<answer>{tower}</answer>", 13) for tower in towers]
        return await asyncio.gather(*jobs, pool.grade("math", "<answer>13</answer>", 13))

    *towers, honest = run_in_pool(scenario, timeout_seconds=1.0)
    assert [grade.reward for grade in towers] == [0.0, 0.0]
    assert honest.reward == 1.0


def test_a_worker_that_dies_costs_one_retry(graders, tmp_path):
    async def scenario(pool):
        once = pool.grade("graders:leave_once", "?", str(tmp_path / "marker"))
        always = pool.grade("graders:leave", "?", None)
        return await asyncio.gather(once, always), pool.snapshot()

    (once, always), snapshot = run_in_pool(scenario)
    assert once == Grade(1.0, "second time")
    assert always == Grade(0.0, "the grader's process died twice (exit status 3): last words")
    assert snapshot["crashes"] == 3 and snapshot["graded"] == 1


def test_memory_is_limited_and_the_worker_replaced(graders):
    async def scenario(pool):
        before = await pool.grade("graders:even", "2", None)
        eaten = await pool.grade("graders:eat_memory", "?", None)
        after = await pool.grade("graders:even", "2", None)
        return before, eaten, after, pool.snapshot()

    before, eaten, after, snapshot = run_in_pool(scenario, memory_limit_bytes=2**30)
    assert eaten == Grade(0.0, "ran over the memory limit of 1024 MiB")
    assert before.reason != after.reason and snapshot["out_of_memory"] == 1


def test_what_a_grader_raises_prints_or_returns_stays_its_own(graders):
    async def scenario(pool):
        kinds = ("fail", "stop", "confused", "chatter")
        return [await pool.grade(f"graders:{kind}", "?", None) for kind in kinds], pool.snapshot()

    (failed, stopped, confused, chatter), snapshot = run_in_pool(scenario)
    assert re.fullmatch(
        r"cannot be graded: KeyError: 'metadata' \(\S+graders.py:\d+\), "
        r"called with the response '\?'",
        failed.reason,
    )
    assert stopped.reason.startswith("cannot be graded: SystemExit: 0 (")
    assert "must return a Grade, got float" in confused.reason
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


def test_ten_megabytes_and_broken_unicode_are_just_wrong_answers(graders):
    async def scenario(pool):
        return [
            await pool.grade("math", f"<answer>{'1' * 10_000_000}</answer>", 13),
            await pool.grade("math", "{" * 5_000_000 + r"\boxed{" + "{" * 5_000_000, 13),
            await pool.grade("graders:echo", "a\ud800b", "t", exact=True),
        ]

    long, nested, surrogate = run_in_pool(scenario)
    assert "too long" in long.reason
    assert "too long" in nested.reason
    assert surrogate.reason == "('a?b', 't', {'exact': True})"


def test_what_the_user_got_wrong_raises(graders):
    async def scenario(pool):
        with pytest.raises(ValueError, match="did you mean 'math'"):
            await pool.grade("maths", "?", None)
        with pytest.raises(ValueError, match="no_such_module"):
            await pool.grade("no_such_module:grade", "?", None)
        with pytest.raises(ValueError, match="has no function odd"):
            await pool.grade("graders:odd", "?", None)
        with pytest.raises(ValueError, match="must be JSON"):
            await pool.grade("math", "?", object())
        with pytest.raises(ValueError, match=r"truth of a math job .* truth is NaN, which is no"):
            await pool.grade("math", "?", float("nan"))
        with pytest.raises(ValueError, match=r"tolerance is NaN, which is no"):
            await pool.grade("graders:even", "2", None, tolerance=float("nan"))
        with pytest.raises(ValueError, match=r"truth\.tests\.0\.result is Infinity"):
            await pool.grade("code", "?", {"tests": [{"args": [], "result": float("inf")}]})
        return await pool.grade("graders:even", "2", None)

    assert run_in_pool(scenario).reward == 1.0


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="rewards.workers must be at least 1, got 0"):
        RewardPool(num_workers=0)
    with pytest.raises(ValueError, match="timeout_seconds must be positive, got 0"):
        RewardPool(timeout_seconds=0)


def test_workers_that_cannot_start_say_so_instead_of_trying_for_ever(monkeypatch):
    async def scenario(pool):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="did not start.*its memory limit is"):
                await pool.grade("math", "<answer>13</answer>", 13)

    monkeypatch.setattr(sys, "executable", "/bin/false")
    run_in_pool(scenario)


def test_a_grader_that_cannot_be_imported_is_an_error_and_not_a_grade(graders, tmp_path):
    (tmp_path / "fragile.py").write_text("import os; os._exit(5)")

    async def scenario(pool):
        with pytest.raises(ValueError, match=r"importing it ends the process \(exit status 5\)"):
            await pool.grade("fragile:grade", "?", None)

    run_in_pool(scenario)


def test_a_memory_limit_too_small_for_the_grader_is_an_error_and_not_a_grade():
    async def scenario(pool):
        with pytest.raises(ValueError, match="within 60,000,000 bytes: rewards.memory_gib"):
            await pool.grade("math", "<answer>13</answer>", 13)

    run_in_pool(scenario, memory_limit_bytes=60_000_000)


def test_a_caller_that_gives_up_leaves_the_pool_working(graders):
    async def scenario(pool):
        jobs = [asyncio.create_task(pool.grade("graders:even", "2", i)) for i in range(50)]
        await asyncio.sleep(0)
        for job in jobs:
            job.cancel()
        return await pool.grade("graders:even", "2", None)

    assert run_in_pool(scenario).reward == 1.0


def test_closing_ends_workers_and_waiting_jobs(graders, tmp_path):
    async def run():
        pool = RewardPool(1, timeout_seconds=60.0)
        first = await pool.grade("graders:even", "2", None)
        hung = asyncio.create_task(pool.grade("graders:hang_in_c", "?", str(tmp_path / "pid")))
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.02)
        await pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            await hung
        with pytest.raises(RuntimeError, match="closed"):
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
            from megatron_r1.rewards.runtime.pool import RewardPool

            async def main():
                pool = RewardPool(1, timeout_seconds=600)
                grade = await pool.grade("graders:even", "2", None)
                print(grade.reason.split()[0], flush=True)
                await pool.grade("graders:start_child", "2", os.devnull)

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
