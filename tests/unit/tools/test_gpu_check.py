"""tools/gpu_check: what passes, fails and is skipped is reported so, and its commands exist."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import PATIENT

from tools.gpu_check import runner
from tools.gpu_check.checks import ALONE, CHECKS, Check
from tools.gpu_check.command import page

ROOT = Path(__file__).parents[3]


def outcomes(tmp_path, *checks, minutes=PATIENT / 60, num_gpus=1):
    return list(runner.run_all(checks, tmp_path, time.time() + 60 * minutes, num_gpus))


def python(code, **options):
    options = {"seconds": PATIENT, "needs": (), **options}
    return Check("a check", ("-c", code), **options)


@pytest.mark.parametrize(
    ("check", "status", "words"),
    [
        (python("print('3 passed in 1 s')"), "passed", "3 passed"),
        (python("print('1 passed, 2 skipped')"), "passed", "2 skipped"),
        (python("print('2 skipped in 1 s')"), "skipped", "2 skipped"),
        (python("import sys; sys.exit('it is broken')"), "failed", "it is broken"),
        (python("import signal; signal.pause()", seconds=1), "failed", "stopped after 1 s"),
        (python("", needs=("no_such_module",)), "skipped", "not installed: no_such_module"),
        (python("", needs=("no_such.module",)), "skipped", "not installed: no_such.module"),
        (python("", num_gpus=2), "skipped", "it needs 2 GPUs"),
    ],
)
def test_what_becomes_of_a_check(tmp_path, check, status, words):
    (outcome,) = outcomes(tmp_path, check)
    assert outcome.status == status and words in outcome.tail[-1]


def test_a_check_is_not_begun_too_late(tmp_path):
    (outcome,) = outcomes(tmp_path, python("print('ran')"), minutes=0)
    assert outcome.status == "no time" and "--minutes" in outcome.tail[0]


def test_the_end_of_a_failed_test_s_output_names_it(tmp_path):
    file = tmp_path / "test_planted.py"
    warned = "    warnings.warn('noise', stacklevel=1)\n" * runner.TAIL_LINES
    file.write_text(f"import warnings\ndef test_broken():\n{warned}    assert not 'planted'\n")
    (outcome,) = outcomes(tmp_path, Check("a check", (*ALONE, str(file)), PATIENT, needs=()))
    assert outcome.status == "failed"
    assert any("FAILED" in line and "test_broken" in line for line in outcome.tail)
    assert any("assert not 'planted'" in line for line in outcome.tail)


def test_the_page_names_what_is_settled_and_shows_what_failed(tmp_path):
    good, bad = python("", settles=("a line",)), python("raise SystemExit('broken')")
    about = {"command": "x", "date": "today", "gpus": ["H100"], "nvidia-smi": ["driver 1"]}
    about |= {"cuda": "13", "python": "3", "processor": "CPU", "versions": {"torch": "2"}}
    text = page(about, outcomes(tmp_path, good, bad))
    assert "| a check | passed | 0 | a line |" in text
    assert "## Failed: a check" in text and "broken" in text
    assert "meaningless" not in text
    text = page(about | {"gpus": ["NVIDIA H100 (null)"]}, outcomes(tmp_path, good))
    assert "times are meaningless" in text and "a line" not in text


def test_every_check_is_of_files_and_lines_that_exist():
    checklist = " ".join((ROOT / "docs" / "gpu-checklist.md").read_text().split())
    for check in CHECKS:
        files = [part for part in (*check.arguments, *check.interpreted) if "/" in part]
        for file in files:
            if not file.startswith(("{out}", "/dev")):
                assert (ROOT / file).exists(), f"{check.name}: {file}"
        for phrase in check.settles:
            assert phrase in checklist, f"{check.name}: {phrase}"


def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "tools/gpu_check"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "--interpret" in done.stderr


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "zmq", "blake3", "msgspec", "megatron", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("tools/gpu_check", "--help"),
        ("tools/bench", "kernels", "--help"),
        (*CHECKS[0].arguments, "--collect-only"),
    ],
)
def test_torch_and_triton_are_enough_for_the_kernels(tmp_path, arguments):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
