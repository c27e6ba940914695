"""`tools/gpu_check` on the null GPU, where times are meaningless."""

import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

from waiting import wait_until

from tools.gpu_check.checks import CHECKS, ONE

ROOT = Path(__file__).parents[2]
FIRST, SECOND, *_ = PART_ONE = [check for check in CHECKS if check.part == ONE]


def start(out, budget):
    command = ["tools/null_gpu", "tools/gpu_check", "--out", str(out), "--budget", budget]
    return subprocess.Popen([sys.executable, *command], cwd=ROOT)


def archived(out):
    """The JSON of the archive, by check in its order."""
    assert (out / "gpu_check.tar.gz").stat().st_size < 60_000_000
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        results = json.load(archive.extractfile("gpu_check/gpu_check.json"))
    return {check["name"]: check for check in results["checks"]}


def test_every_check_is_reached_in_order(tmp_path):
    """Engines take longer to start here than on a GPU: a check may be stopped at its limit."""
    start(tmp_path, "540").wait()
    found = archived(tmp_path)
    assert list(found) == [check.name for check in PART_ONE]
    endings = {name: (check["status"], check["reason"]) for name, check in found.items()}
    assert {status for status, _ in endings.values()} <= {"passed", "stopped"}, endings
    assert "times are meaningless" in (tmp_path / "gpu_check.md").read_text()


def test_a_run_that_is_killed_leaves_its_figures(tmp_path):
    process = start(tmp_path, "5400")  # ten times the limits: the first check ends
    wait_until((tmp_path / SECOND.slug / "output.log").exists)
    process.send_signal(signal.SIGTERM)
    process.wait()
    found = archived(tmp_path)
    assert list(found) == [FIRST.name, SECOND.name]
    assert found[FIRST.name]["status"] == "passed"
    figures = found[FIRST.name]["figures"]
    assert figures["GPU"].startswith("NVIDIA H100 (null), sm_90")
    assert figures["attention, flagship, training True"] == "fused"
    assert found[SECOND.name]["reason"] == "by SIGTERM"
    assert list((tmp_path / "cache" / "deep_gemm").rglob("*.cubin"))
