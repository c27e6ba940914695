"""`python tools/gpu_check`: the checks of docs/gpu-checklist.md on a machine with a GPU.

They are tests (tests/gpu), run in the order of what a second of each proves, within --budget
seconds and without a network. Each has a process of its own and a limit; one whose limit no longer
fits is not begun. --out has a page, the figures, the output of each check, and an archive of them
(gpu_check.tar.gz) that is complete after every check, and after
SIGTERM, SIGINT and SIGHUP. Status 1: a check failed,
or was stopped."""

import argparse
import contextlib
import datetime
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from megatron_r1.base.files import atomic_write
from tools.bench import host
from tools.gpu_check.checks import (
    CHECKS,
    INTERPRETED,
    ONE,
    OVERHEAD_SECONDS,
    SEVERAL,
    Check,
    seconds_for,
)
from tools.gpu_check.pytest_plugin import DEADLINE, FOLDER, RESULT

PACKAGES: tuple[str, ...] = ("torch", "triton", "transformer-engine", "megatron-core", "vllm")
PACKAGES += ("nvidia-cudnn-cu13", "nvidia-cuda-nvrtc", "nvidia-cuda-nvcc", "flash-attn")
QUERY = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,mig.mode.current"
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}
"""Folders of compiled code, which all checks share, by the environment variable that names each."""
GRACE_SECONDS = 4.0
"""The end of a check's time, in which it stops what it has started."""
TAIL_LINES = 25
ARCHIVE_BYTES, FILE_BYTES = 15_000_000, 1_500_000
"""The most of all files in the archive, and of the end of each that is kept: small enough to copy
off any machine."""
ARCHIVED = (".json", ".jsonl", ".yaml", ".md", ".log", ".txt")
PASSED, FAILED, IMPOSSIBLE = "passed", "failed", "not possible here"
STOPPED, NO_TIME = "stopped", "no time"
ON_NULL_GPU = "**This is the null GPU of tools/null_gpu: times are meaningless.**"


class Terminated(Exception):
    """A signal of `ENDING` has come."""


class Results:
    """What is known so far, and its files."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.machine: dict[str, Any] = {
            "command": " ".join(["python tools/gpu_check", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "null GPU": "NULL_GPUS" in os.environ,
            "nvidia-smi": _nvidia_smi(),
            "python": sys.version.split()[0],
            "processor": f"{host.processor()}, {host.num_cores()} cores",
            "versions": host.versions(PACKAGES),
        }
        self.checks: list[dict[str, Any]] = []

    def add(self, check: Check, status: str, reason: str = "", **fields: Any) -> None:
        """Add the outcome of a check, and write all files."""
        command = " ".join(("python", *check.arguments))
        outcome: dict[str, Any] = {"seconds": 0.0, "figures": {}, "tail": []} | fields
        outcome |= {"name": check.name, "command": command, "status": status, "reason": reason}
        self.checks.append(outcome)
        print(f"{status:8} {outcome['seconds']:6.1f} s  {check.name}  {reason}", flush=True)
        if outcome["figures"]:
            print(f"    {_in_one_line(outcome['figures'])}", flush=True)
        if status in (FAILED, STOPPED):
            print("\n".join(f"    {line}" for line in outcome["tail"]), flush=True)
        self.write()

    def write(self) -> None:
        """Write page, figures and archive."""
        results = json.dumps(self.machine | {"checks": self.checks}, indent=1)
        atomic_write(self.out / "gpu_check.json", results + "\n")
        atomic_write(self.out / "gpu_check.md", self.page())
        atomic_write(self.out / "gpu_check.tar.gz", _archive(self.out))

    def page(self) -> str:
        """Return the page in Markdown: the machine, the checks, and the output of what failed."""
        machine = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        lines = [f"# GPU check, {machine['date']}", ""]
        lines += [f"`{machine['command']}`; {'; '.join(machine['nvidia-smi'])}; Python "]
        lines[-1] += f"{machine['python']}, {machine['processor']}; {versions}."
        lines += ["", ON_NULL_GPU] if machine["null GPU"] else []
        lines += ["", "| check | result | seconds | figures |", "|---|---|---:|---|"]
        for check in self.checks:
            result = ": ".join(filter(None, (check["status"], check["reason"])))
            cells = check["name"], result, f"{check['seconds']:.0f}", _in_one_line(check["figures"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for check in self.checks:
            if check["status"] in (FAILED, STOPPED):
                lines += ["", f"## {check['name']}", "", f"`{check['command']}`"]
                lines += ["```", *check["tail"], "```"]
        return "\n".join(lines) + "\n"

    def run(self, check: Check, seconds: float) -> None:
        """Run a check for at most so many seconds, and add its outcome.

        Raises:
            Terminated: a signal has come; the check is stopped."""
        folder = self.out / check.slug
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        log, result = folder / "output.log", folder / "result.json"
        start = time.time()
        variables = {RESULT: str(result), FOLDER: str(folder / "run")}
        variables[DEADLINE] = str(start + seconds - GRACE_SECONDS)

        def add(code: int | None, stopped: str = "") -> None:
            lines = log.read_text(errors="replace").splitlines()
            counts = json.loads(result.read_text()) if result.exists() else {}
            status, reason = (STOPPED, stopped) if stopped else _outcome(code, counts)
            outcome = {"seconds": round(time.time() - start, 1), "tail": lines[-TAIL_LINES:]}
            self.add(check, status, reason, figures=counts.get("figures", {}), **outcome)

        log.touch()
        process = None
        try:
            process = _start(check, log, variables)
            code = process.wait(max(0.0, seconds - GRACE_SECONDS))
        except (subprocess.TimeoutExpired, Terminated) as error:
            by_signal = isinstance(error, Terminated)
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until it is stopped
                # Before it is stopped: there may be no time for more.
                add(None, f"by {error}" if by_signal else f"after {seconds - GRACE_SECONDS:.0f} s")
            finally:
                _stop(process)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            if by_signal:
                raise
        else:
            add(code)


def _outcome(code: int | None, counts: dict[str, Any]) -> tuple[str, str]:
    """Return status and reason of a check that has ended with a status of pytest's."""
    reasons = "; ".join(dict.fromkeys(counts.get("reasons", [])))
    if code != 0:
        return FAILED, reasons or f"pytest ended with status {code}"
    if counts.get("passed"):
        return PASSED, reasons
    return IMPOSSIBLE, reasons


def _start(check: Check, log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *check.arguments],
            cwd=host.ROOT,
            env=host.environment(**variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes] | None) -> None:
    """End a check with what it has started, in sessions of their own too."""
    import psutil  # here, as kernels need little more than torch and Triton

    if process is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
    process.kill()
    process.wait()


def _archive(out: Path) -> bytes:
    """Return a tar.gz of the files of a run, smallest first, each with its end.

    A running check may remove any of them meanwhile."""
    sizes: list[tuple[int, Path]] = []
    for folder, folders, names in os.walk(out):
        folders[:] = [name for name in folders if name != "cache"]
        for file in (Path(folder, name) for name in names if name.endswith(ARCHIVED)):
            with contextlib.suppress(OSError):
                if file.is_file():
                    sizes.append((file.stat().st_size, file))
    buffer, left = io.BytesIO(), ARCHIVE_BYTES
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for _, file in sorted(sizes):
            with contextlib.suppress(OSError):
                content = file.read_bytes()[-FILE_BYTES:]
                left -= len(content) + 2 * tarfile.BLOCKSIZE
                if left < 0:
                    break
                entry = tarfile.TarInfo(f"gpu_check/{file.relative_to(out)}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _in_one_line(figures: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )


def _nvidia_smi() -> list[str]:
    command = ["nvidia-smi", QUERY, "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi: {error}"]
    return (process.stdout or process.stderr).strip().splitlines()


def _select_checks(args: argparse.Namespace) -> list[Check]:
    for name in args.only:
        if not any(check.name.startswith(name) for check in CHECKS):
            sys.exit(f"--only {name}: the checks are {', '.join(check.name for check in CHECKS)}")
    if args.interpret:
        return list(INTERPRETED)
    if args.only:
        return [check for check in CHECKS if check.name.startswith(tuple(args.only))]
    return [check for check in CHECKS if check.part == args.part]


def _terminate(number: int, frame: object) -> None:
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise Terminated(signal.Signals(number).name)


def main() -> int:
    """Run the checks; return the exit status."""
    start = time.time()
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=host.ROOT / "build" / "gpu_check")
    parser.add_argument("--budget", type=float, default=540, help="seconds of all checks")
    parser.add_argument("--part", choices=(ONE, SEVERAL), default=ONE, help="how many GPUs")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a beginning; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="print the checks' commands")
    parser.add_argument("--interpret", action="store_true", help="kernels on a CPU, without times")
    args = parser.parse_args()
    checks = _select_checks(args)
    if args.list:
        print("\n".join(" ".join(("python", *check.arguments)) for check in checks))
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {name: str(out / "cache" / folder) for name, folder in CACHES.items()}
    results = Results(out)
    for number in ENDING:
        signal.signal(number, _terminate)
    try:
        if args.interpret:
            os.environ["TRITON_INTERPRET"] = "1"
        else:
            from megatron_r1.engines.server.environment_variables import compiler_environment

            _check_gpu()
            os.environ |= compiler_environment()
        left = args.budget - (time.time() - start)
        factor = max(1.0, left / sum(check.limit + OVERHEAD_SECONDS for check in checks))
        for index, check in enumerate(checks):
            left = args.budget - (time.time() - start)
            if seconds := seconds_for(check, checks[index + 1 :], left, factor):
                results.run(check, seconds)
            else:
                needs = f"it needs {check.limit:.0f} s, and {left:.0f} are left"
                results.add(check, NO_TIME, f"{needs}: raise --budget, or choose it by --only")
    except Terminated:
        return 128 + signal.SIGTERM
    finally:
        results.write()
        print(f"results: {out}/gpu_check.md, gpu_check.tar.gz", flush=True)
    return int(any(check["status"] in (FAILED, STOPPED) for check in results.checks))


def _check_gpu() -> None:
    import torch

    if not torch.cuda.device_count():
        sys.exit(
            "no GPU: torch.cuda.device_count() is 0. Run this where one is, or add --interpret, "
            "which runs kernels in Triton's interpreter"
        )
