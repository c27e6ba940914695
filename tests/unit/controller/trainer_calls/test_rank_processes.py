"""The message about a trainer rank that has ended."""

import subprocess
import sys

import pytest

from megatron_r1.base.processes import oom_kills
from megatron_r1.controller.trainer_calls.rank_processes import RankProcesses


@pytest.mark.parametrize(("kills", "says"), [(3, False), (4, True)])
def test_a_kill_for_lack_of_memory_is_named_with_its_remedy(kills, says, tmp_path, monkeypatch):
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 12\noom_kill 3\n")
    monkeypatch.setattr(oom_kills, "OOM_COUNTERS", counters)
    ranks = RankProcesses(tmp_path)
    ranks._kills_before = oom_kills.num_oom_kills()
    (tmp_path / "trainer_0.log").write_text("step 1\n")
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    process.kill()
    process.wait()
    ranks._processes = [process]
    counters.write_text(f"oom_kill {kills}\n")
    cause = ranks.cause_of_death(0, "update")
    assert cause.startswith("trainer rank 0 was killed by signal 9") and "step 1" in cause
    assert ("lack of memory" in cause and "tokens_per_microbatch" in cause) == says


NCCL_LOG = """\
[rank0]:[E1206 18:44:12.715298746 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective \
operation timeout: WorkNCCL(SeqNum=7753, OpType=BROADCAST, NumelIn=1, NumelOut=1, \
Timeout(ms)=7200000) ran for 7200061 milliseconds before timing out.
[rank0]:[E1206 18:44:12.716278512 ProcessGroupNCCL.cpp:1664] [PG 1 Rank 0] Exception detected
"""


@pytest.mark.parametrize(("timeout_seconds", "is_named"), [(7200.0, True), (600.0, False)])
def test_nccls_timeout_is_named_with_its_key(timeout_seconds, is_named, tmp_path):
    ranks = RankProcesses(tmp_path)
    ranks._timeout_seconds = timeout_seconds
    (tmp_path / "trainer_0.log").write_text(NCCL_LOG + "frame of C++\n" * 40)
    process = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"])
    process.wait()
    ranks._processes = [process]
    cause = ranks.cause_of_death(0, "export")
    assert cause.startswith("trainer rank 0 was killed by signal 6")
    assert (
        "'export'" in cause and "BROADCAST" in cause and "parallel.timeout_seconds: 7200" in cause
    ) == is_named


def test_a_system_without_the_counter_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(oom_kills, "OOM_COUNTERS", tmp_path / "none")
    assert oom_kills.num_oom_kills() == 0 and oom_kills.oom_explanation(0, "") == ""
