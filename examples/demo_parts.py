"""Common parts of the demos: run a part as a command of its own, compare the first held-out
evaluation with the last in a table."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from megatron_r1.base.processes.children import die_with_parent


def announce(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def megatron_r1(verb: str, recipe: Path, folder: Path, seed: str, *settings: str) -> None:
    common = ["--run.folder", str(folder), "--run.seed", seed]
    python("megatron_r1", verb, str(recipe), *common, *settings)


def python(module: str, *arguments: str) -> None:
    """Run a module; if it fails, end the demo with its exit status: it has printed the reason.

    A signal that ends the demo ends the module, too, which finishes its present step."""
    command = [sys.executable, "-m", module, *arguments]
    # Ctrl-C also reaches the module: wait for it. SIGKILL of the demo becomes its SIGTERM.
    handlers = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    process = subprocess.Popen(command, preexec_fn=partial(die_with_parent, signal.SIGTERM))
    handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if status:
        sys.exit(status)


def show_result(run: Path, before: str, seconds: float, *, intervals: bool = False) -> None:
    """Print the first and the last held-out evaluation of an RL run, and where its files are.

    Args:
        before: what the policy was called at first.
        intervals: print 95% intervals too."""
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").open()]
    votes = next(key for key in evaluations[0] if key.startswith("eval/cons@"))
    announce(f"done in {seconds / 60:.1f} minutes")
    width = 23 if intervals else 9
    print(f"{'held-out questions':30}{before:>{width}}{'after RL':>{width}}")
    for name, key in (
        ("accuracy, one answer (pass@1)", "eval/pass@1"),
        (f"accuracy, majority ({votes[5:]})", votes),
    ):
        cells = (_format_share(e, key, intervals) for e in (evaluations[0], evaluations[-1]))
        print(f"{name:30}" + "".join(f"{cell:>{width}}" for cell in cells))
    lengths = (f"{e['eval/response_length']:.1f}" for e in (evaluations[0], evaluations[-1]))
    print(f"{'response length, tokens':30}" + "".join(f"{each:>{width}}" for each in lengths))
    print(f"\nreport:  {run / 'report.html'}      curves: .venv/bin/tensorboard --logdir {run}")
    print(f"model:   {run / 'hf'}      (loads in transformers and vLLM)")
    print(f"resumes: {run / 'checkpoints'} (Megatron's own, of any parallel layout)")


def _format_share(evaluation: dict[str, float], key: str, interval: bool) -> str:
    text = f"{evaluation[key]:.1%}"
    name = key.replace("eval/", "interval/", 1)
    if interval:
        text += f" ({evaluation[f'{name}/low']:.1%}-{evaluation[f'{name}/high']:.1%})"
    return text
