"""Measures claims: runs their commands one after the other, and records each figure that is printed
with the machine and what else it did."""

import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tools.evidence.records import (
    Claim,
    Failed,
    Measured,
    changed_files,
    changes_since,
    head,
    states,
    write_claim,
)

LOGS = "build/evidence"
TAIL_LINES = 15
MAX_BUSY = 0.3
"""Cores that may be at other work where a speed is measured without being asked for."""
END_SECONDS = 10.0
"""What a command that is over its limit has to end by itself."""


def measure_all(
    root: Path,
    claims: list[Claim],
    ids: list[str],
    limit: float | None,
    on_record: Callable[[Path], None],
) -> int:
    """Measure the claims named, or those that are not fresh; return how many gave no figure.

    Args:
        root: The folder of the repository.
        claims: All claims.
        ids: The claims to measure; empty: those that are not fresh.
        limit: Seconds that a command may take; None: four times its last run, 300 at least.
        on_record: Called with `root` after each record.
    """
    selected_claims = (
        [claim for claim in claims if claim.id in ids] if ids else measuring_order(root, claims)
    )
    num_failed = 0
    for number, claim in enumerate(selected_claims, 1):
        title = f"[{number} of {len(selected_claims)}] {claim.id}"
        print(f"{title}: {claim.command} ({claim.seconds:.0f} s)")
        sys.stdout.flush()
        changed_names = changed_files(changes_since(root, "HEAD"), claim.paths)
        if changed_names is None or changed_names:
            reason = "git has no commit here"
            if changed_names:
                reason = f"commit {', '.join(changed_names)} first"
            print(f"  not measured: {reason}; a record says which commit was measured")
            num_failed += 1
            continue
        num_busy = busy_cores()
        if claim.topic == "speed" and num_busy > MAX_BUSY and not ids:
            print(
                f"  not measured: {num_busy:.1f} cores have other work; "
                f"CLAIM={claim.id} does it anyway"
            )
            num_failed += 1
            continue
        claim_limit = limit or max(300.0, 4 * claim.seconds)
        result = measure_claim(root, claim, claim_limit, machine(num_busy))
        write_claim(root, result)
        on_record(root)
        if result.failed:
            num_failed += 1
            print(f"  failed: {result.failed.reason}")
            if claim.measured:
                print(f"  the figure of {claim.measured.commit} stays: {claim.measured.figure}")
        elif result.measured:
            former_figure = f" (before: {claim.measured.figure})" if claim.measured else ""
            print(f"  {result.measured.figure}{former_figure}")
    return num_failed


def measuring_order(root: Path, claims: list[Claim]) -> list[Claim]:
    """Return the claims that are not fresh, the shortest first; what has failed on these very files
    comes last, so that a second start does not begin with it."""
    claim_states = states(root, claims)

    def has_failed(claim: Claim) -> bool:
        commit = claim.failed.commit if claim.failed else None
        return commit is not None and changed_files(changes_since(root, commit), claim.paths) == []

    candidates = [claim for claim in claims if claim_states[claim.id].name != "fresh"]
    return sorted(candidates, key=lambda claim: (has_failed(claim), claim.seconds, claim.id))


def measure_claim(root: Path, claim: Claim, limit: float, machine_state: str) -> Claim:
    """Run the claim's command; return the claim with the figure, or with the failure and the figure
    that it had. The output is in build/evidence.

    Args:
        root: the repository's root.
        claim: the claim.
        limit: the most seconds that the command may take.
        machine_state: the machine and what else it does."""
    commit, start = head(root), time.monotonic()
    status, output = run(root, claim, limit)
    figure, reason = None, ""
    if status is None:
        reason = f"ended after the limit of {limit:.0f} s"
    elif status:
        reason = f"exit status {status}"
    elif changed_files(changes_since(root, commit), claim.paths) != []:
        reason = "the files changed while it ran"
    else:
        figure, reason = read_figure(claim, output)
    today = datetime.date.today().isoformat()
    if figure is None:
        lines = output.replace(f"{root}/", "").replace(str(root), ".").rstrip().splitlines()
        tail = "\n".join(line[:200] for line in lines[-TAIL_LINES:])
        return replace(claim, failed=Failed(reason, commit, today, machine_state, tail))
    seconds = round(time.monotonic() - start, 1)
    result = Measured(figure, commit, today, machine_state)
    return replace(claim, seconds=seconds, measured=result, failed=None)


def run(root: Path, claim: Claim, limit: float) -> tuple[int | None, str]:
    """Run the command and wait for it; return its exit status, None for one that was ended after
    `limit` seconds, and its output.

    Args:
        root: the repository.
        claim: the claim, whose command runs.
        limit: seconds."""
    log = root / LOGS / f"{claim.id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", claim.command],
            cwd=root,
            env=os.environ | {"PATH": programs},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_process(process)
    return status, log.read_text(encoding="utf-8", errors="replace")


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a command and of the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # a child that has ended stays in its group until then
                os.killpg(process.pid, 0)
                time.sleep(0.05)


def read_figure(claim: Claim, output: str) -> tuple[str | None, str]:
    """Return the figure, or None and the reason why there is none."""
    values: dict[str, str] = {}
    for pattern in claim.reads:
        matches = list(re.finditer(pattern, output, re.MULTILINE))
        if not matches:
            return None, f"the output has nothing that matches {pattern}"
        values |= matches[-1].groupdict()
    for name, (low, high) in claim.bounds.items():
        value = float(values[name].replace(",", ""))
        if (low is not None and value < low) or (high is not None and value > high):
            return None, f"{name} is {values[name]}, which the claim does not allow"
    return claim.figure.format_map(values), ""


def machine(num_busy: float) -> str:
    """Return the processor, the usable cores, how many were at other work, and the memory."""
    from tools.bench import host  # imports xxhash, which `status` does without

    kib = re.search(r"^MemTotal:\s+(\d+)", _file_text("/proc/meminfo"), re.MULTILINE)
    amx = ", AMX" if "amx_tile" in _file_text("/proc/cpuinfo") else ""
    memory = f", {int(kib[1]) / 2**20:.0f} GiB" if kib else ""
    processor, cores = host.processor(), host.num_cores()
    return f"{processor}{amx}, {cores} cores ({num_busy:.1f} busy before){memory}"


def busy_cores(seconds: float = 0.3) -> float:
    """Return how many cores are at work now."""
    before = _busy_ticks()
    time.sleep(seconds)
    return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def _busy_ticks() -> int:
    # user, nice, system, idle, iowait, irq, softirq, steal: proc_stat(5)
    ticks = [int(word) for word in _file_text("/proc/stat").partition("\n")[0].split()[1:9]]
    return sum(ticks) - sum(ticks[3:5])


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
