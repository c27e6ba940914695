"""The worker process of `python tools/bench kernels`, supervised.

It measures all cases. If it dies or reports nothing for too long (a peer crashed
it, broke the CUDA context or deadlocked), the implementation it was running becomes a row with
that reason, and a new worker continues with the same case, without that implementation."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from r1_kernels_bench.implementations import TOO_LATE
from tools.bench.host import environment

SILENCE_SECONDS = 100.0  # of one step: a compilation takes up to a minute
GRACE_SECONDS = 45.0  # after the deadline, for the step it fell into
# Twenty implementations share one allocator: without this, fragments of one leave too little room
# for the next.
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
WORKER = (sys.executable, "-m", "r1_kernels_bench.worker")


def worker_results(
    task: dict[str, Any],
    progress: Callable[[str], None],
    silence: float = SILENCE_SECONDS,
    worker: Sequence[str] = WORKER,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (case name, result) for each of task["cases"], in order.

    Args:
        task: what the worker measures; task["deadline"] is as time.time().
        progress: called with what is being measured.
        silence: the seconds without a message after which the worker is given up.
        worker: the worker's command."""
    task = {**task, "skip": {name: {} for name in task["cases"]}}
    while task["cases"]:
        if time.time() > task["deadline"]:
            yield from ((case, {"failed": TOO_LATE}) for case in task["cases"])
            return
        activity, reason = "", ""
        for message in _worker_messages(task, silence, worker):
            if "result" in message:
                yield message["case"], message["result"]
                task["cases"] = task["cases"][1:]
                activity = ""
            elif "doing" in message:
                activity = message["doing"]
                progress(f"{message['case']}: {activity}")
            else:
                reason = reason or message.get("broken") or message["ended"]
        if task["cases"]:
            case, *remaining_cases = task["cases"]
            if activity in ("", "inputs", "bound") or activity in task["skip"][case]:
                yield case, {"failed": reason or "the measuring process ended"}
                task["cases"] = remaining_cases
            else:
                task["skip"][case][activity] = reason


def _worker_messages(
    task: dict[str, Any], silence: float, command: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the worker's messages, then {"ended": why} unless it ended with success."""
    with tempfile.TemporaryFile("w+") as log:
        name, value = ALLOCATOR
        env = environment(**{name: os.environ.get(name, value)})
        worker = subprocess.Popen(
            command,
            env=env,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert worker.stdin
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read_output, args=(worker.stdout, lines), daemon=True).start()
        try:
            worker.stdin.write(json.dumps(task))
            worker.stdin.close()
            while line := lines.get(timeout=_silence_timeout(task["deadline"], silence)):
                message = json.loads(line)
                if "done" in message:
                    return
                yield message
        except queue.Empty:
            seconds = _silence_timeout(task["deadline"], silence)
            yield {"ended": f"no answer for {seconds:.0f} seconds: stopped"}
        except BrokenPipeError:
            pass
        finally:
            _stop_worker(worker)
        if worker.returncode > 0:
            log.seek(0)
            tail = [line.strip() for line in log if line.strip()][-1:]
            yield {"ended": f"ended the process: {tail[0][:110] if tail else 'without a word'}"}
        elif worker.returncode < 0:
            yield {"ended": f"ended the process: {signal.Signals(-worker.returncode).name}"}


def _silence_timeout(deadline: float, silence: float) -> float:
    """Return the seconds to wait for the next message: `silence`, or less near the deadline."""
    return max(1.0, min(silence, deadline + GRACE_SECONDS - time.time()))


def _read_output(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _stop_worker(worker: subprocess.Popen[str]) -> None:
    """Kill the worker and its children (torch.compile's compilers) unless it ended by itself."""
    try:
        worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
