"""Claims and their figures: `python -m tools.evidence [status | render | measure [ID ...]]`.

status says of each claim whether the files that it depends on have changed since it was measured.
render writes docs/evidence.md from docs/evidence/*.json. measure runs the commands of the claims
named, or of all that are not fresh, the shortest first, and writes each result at once: stopped
and started again, it goes on."""

import argparse
import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from megatron_r1.base.files import atomic_write
from tools.evidence.records import (
    TOPICS,
    Claim,
    Failed,
    Measured,
    State,
    changed_files,
    changes_since,
    head,
    read_claims,
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

    kib = re.search(r"^MemTotal:\s+(\d+)", _text("/proc/meminfo"), re.MULTILINE)
    amx = ", AMX" if "amx_tile" in _text("/proc/cpuinfo") else ""
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
    ticks = [int(word) for word in _text("/proc/stat").partition("\n")[0].split()[1:9]]
    return sum(ticks) - sum(ticks[3:5])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


PAGE_HEAD = """# Evidence

<!-- Generated by `python -m tools.evidence render` from docs/evidence/*.json: edit those. -->

Each claim with the command that checks it, the figure that it printed, the day and the commit. **No
GPU has run any of these commands** ([one H200](benchmarks/gpu-h200.md) ran others): [what is not
proven](not_proven.md). The machines had two x86-64 cores, 24 GB of memory and no GPU; the record
behind a claim's name has the rest.

- *fresh*: no file that the claim depends on has changed since, comments, docstrings, names of local
  variables and moves of definitions between these files apart; on Triton's kernels depend only the
  claims that run or compile them. *stale*: some have. *unknown*: the clone lacks the commit.
  *failed*: a later run of the command gave no figure; the one shown is from before it.
- `python -m tools.evidence status` says this of your tree. `make evidence` measures what is not
  fresh, the shortest first, and goes on after a stop; `make evidence CLAIM=id` measures one claim.
- Speeds are measured where no other work takes the cores, or with it said; compare ratios.
- Commands run in the repository's root, with `.venv/bin` first in the path.
"""
COLUMNS = "| claim | command, seconds | figure | measured | state |\n|---|---|---|---|---|"


def render(claims: list[Claim], states: dict[str, State], commit: str) -> str:
    """Return the page.

    Args:
        claims: the claims of the page.
        states: the state of each claim, by its id.
        commit: the commit at which `states` hold, "" where that is not known."""
    lines = [PAGE_HEAD, state_line(states.values(), commit)]
    for topic, title in TOPICS.items():
        rows = [claim_row(claim, states[claim.id]) for claim in claims if claim.topic == topic]
        if rows:
            lines += ["", f"## {title}", COLUMNS, *rows]
    return "\n".join(lines) + "\n"


def claim_row(claim: Claim, state: State) -> str:
    page = (
        claim.page.removeprefix("docs/") if claim.page.startswith("docs/") else f"../{claim.page}"
    )
    measured = claim.measured
    figure = measured.figure if measured else ""
    provenance = f"{measured.date}, {measured.commit}" if measured else ""
    if measured and claim.topic == "speed":
        provenance += f"; {measured.machine}"
    cells = [
        f"{claim.claim} [{claim.id}](evidence/{claim.id}.json), [page]({page})",
        f"`{claim.command}`, {claim.seconds:.0f}",
        figure,
        provenance,
        state.text,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def state_line(states: Iterable[State], commit: str) -> str:
    return f"At `{commit or 'unknown'}`: {summary(states)}."


def summary(states: Iterable[State]) -> str:
    """Return how many claims are in which state."""
    states = list(states)
    counts = Counter(state.name for state in states)
    counts["failed"] = sum(bool(state.failed) for state in states)
    names = ("fresh", "stale", "unknown", "not measured", "failed")
    parts = ", ".join(f"{counts[name]} {name}" for name in names if counts[name])
    return f"{len(states)} claims: {parts or 'none'}"


ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/evidence.md"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run one of the commands; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evidence",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", default="status", choices=["status", "render", "measure"]
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims to measure, fresh or not")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of one claim's command")
    args = parser.parse_args(arguments)
    claims = {claim.id: claim for claim in read_claims(root)}
    if missing := [name for name in args.ids if name not in claims]:
        parser.error(f"no such claim: {', '.join(missing)}; there are {', '.join(claims)}")
    status = 0
    if args.what == "measure":
        # Each result is on the page as soon as it is there, in case the next command is stopped.
        num_failed = measure_all(root, list(claims.values()), args.ids, args.limit, write_page)
        status = min(num_failed, 1)
    elif args.what == "render":
        write_page(root)
    else:
        print_status(root)
    return status


def write_page(root: Path) -> None:
    claims = read_claims(root)
    text = render(claims, states(root, claims), head(root))
    atomic_write(root / PAGE, text)


def print_status(root: Path) -> None:
    claims = read_claims(root)
    claim_states = states(root, claims)
    width = max((len(claim.id) for claim in claims), default=0)
    for claim in claims:
        state = claim_states[claim.id]
        files = ", ".join(state.changed[:3]) + (", ..." if len(state.changed) > 3 else "")
        line = f"{claim.id:{width}}  {state.text:24} {claim.seconds:6.0f} s  {files}"
        print(line.rstrip())
    print(summary(claim_states.values()))
