"""An RL run with one response of 65,536 tokens, and each process's memory next to the plan's.

`python tests/system/long_response.py FILE.json` writes docs/benchmarks/long-response.json and
prints that page's table; test_long_response.py makes the same runs in `make test-all`."""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

from command_line import command, environment
from long_model import write_recipe

ROOT = Path(__file__).parents[2]
ROLES = {
    "megatron_r1.trainer.rank": "trainer rank",
    "megatron_r1.engines.plugin.serve": "engine, server",
    "VLLM::EngineCore": "engine, core",
    "r1_grading": "grader",
    "megatron_r1 rl": "controller",
}
"""The role of a process by what is in its command line."""
SHORT = ("--rollout.max_response_tokens=64", "--parallel.tokens_per_microbatch=1024")
"""The same recipe without a long response: what a process takes before length counts. Like it, two
steps: the first push adds 66 MB to an engine, and the last one may end between two readings."""
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"log": {"class": "logging.StreamHandler"}},
    "loggers": {"vllm.platforms.cpu": {"level": "INFO", "handlers": ["log"]}},
}
"""Logging of vLLM that names the attention backend: an engine's own level, WARNING, hides it."""


class Processes(threading.Thread):
    """The largest resident memory (VmHWM), and the core seconds, of each process below this one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found: dict[int, dict[str, Any]] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        import psutil

        while not self.ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    words, times = " ".join(process.cmdline()), process.cpu_times()
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except (OSError, psutil.Error):
                    continue
                role = next((role for part, role in ROLES.items() if part in words), None)
                if role and (peak := re.search(r"VmHWM:\s+(\d+) kB", status)):
                    self.found[process.pid] = {
                        "role": role,
                        "peak_bytes": 1024 * int(peak[1]),
                        "core_seconds": times.user + times.system,
                    }


def measure(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run the recipe in `folder`; return its metrics, its processes, the attention backends that
    the engine's log names, and what megatron-r1 plan says.

    Raises RuntimeError with the run's output where it fails."""
    folder.mkdir(parents=True)
    recipe, processes = write_recipe(folder), Processes()
    plan = folder / "plan.json"
    options = ["--rollout-gpus", "1", "--prompt-tokens", "2", "--json", str(plan)]
    _run([sys.executable, "tools/plan", str(recipe), *options, *overrides], cwd=ROOT)
    logging = folder / "logging.json"
    logging.write_text(json.dumps(LOGGING))
    variables = environment() | {"VLLM_LOGGING_CONFIG_PATH": str(logging)}
    variables.pop("VLLM_MLA_DISABLE", None)  # engines inherit it and would do without latents
    processes.start()
    began = time.monotonic()
    _run(command("rl", recipe, *overrides), env=variables)
    seconds = time.monotonic() - began
    processes.ended.set()
    return {
        "seconds": seconds,
        "metrics": _lines(folder / "rl/metrics.jsonl"),
        "lengths": [line["length"] for line in _lines(folder / "rl/samples.jsonl")],
        "attention": re.findall(
            r"Using (\w+) backend", (folder / "rl/logs/engine-0.log").read_text()
        ),
        "processes": sorted(processes.found.values(), key=itemgetter("role", "peak_bytes")),
        "plan": json.loads(plan.read_text())["sections"],
    }


def _run(words: list[str], **options: Any) -> None:
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout[-2000:]}{done.stderr[-8000:]}")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def peak(report: dict[str, Any], role: str) -> int:
    """Return the largest peak of the role's processes, bytes."""
    return max(p["peak_bytes"] for p in report["processes"] if p["role"] == role)


def planned(report: dict[str, Any], role: str) -> float:
    """Return the planned bytes that grow with the length of a response, of a trainer rank or an
    engine; without the loss head's, which depend on the device."""
    sections = report["plan"]
    if role == "trainer rank":
        memory = sections["memory of pipeline rank 0, the fullest"]
        return memory["activations"]["value"] + memory["layer in work"]["value"]
    tokens = sum(report["lengths"][:8])
    return tokens * sections["engine memory of a GPU"]["KV cache of a token"]["value"]


def growth(long: dict[str, Any], short: dict[str, Any], role: str) -> tuple[float, float]:
    """Return (measured, planned) bytes that the long response adds to a process of `role`."""
    return peak(long, role) - peak(short, role), planned(long, role) - planned(short, role)


def main(file: str, *overrides: str) -> None:
    with tempfile.TemporaryDirectory(prefix="long") as temporary:
        short = measure(Path(temporary, "short"), *SHORT)
        long = measure(Path(temporary, "long"), *overrides)
    report = {"short": short, "long": long}
    Path(file).write_text(json.dumps(report, indent=1) + "\n")
    for role in ROLES.values():
        line = f"{role:16} {peak(short, role) / 1e6:8.0f} MB {peak(long, role) / 1e6:8.0f} MB"
        if role in ("trainer rank", "engine, core"):
            measured, plan = growth(long, short, role)
            line += f" {measured / 1e6:8.0f} MB {plan / 1e6:8.0f} MB {measured / plan:6.2f}"
        print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
