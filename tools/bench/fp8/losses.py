"""Measures the loss of FP8 training: the same small DeepSeek-V3 trained in each of the numerics.

All variants start from the same weights and see the same sentences, for several seeds. Without a
GPU, FP8 is emulated: the figures are about numerics, and the seconds are those of the emulation.

The sentences are of a synthetic language of known entropy: each token is drawn given the two
before it. Of 64 tokens, 4 may follow a pair (the older one counts modulo 4), with probabilities
0.55, 0.25, 0.15 and 0.05 in an order drawn once per language. A model that has learned the table
has a loss of 1.11 nats a token, an untrained one log 64 = 4.16. As with real text, the loss falls
and ends above zero."""

import argparse
import json
import math
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from tools.bench.host import run_to_end

PROBABILITIES = (0.55, 0.25, 0.15, 0.05)
ENTROPY = -sum(p * math.log(p) for p in PROBABILITIES)
LENGTH = 64


class Language:
    def __init__(self, vocabulary: int, seed: int):
        draw = random.Random(f"language {seed}")
        self.vocabulary = vocabulary
        # 4 classes for the token before last: few enough to be learned in a hundred steps.
        self._followers = {
            (older, last): draw.sample(range(vocabulary), len(PROBABILITIES))
            for older in range(4)
            for last in range(vocabulary)
        }

    def sentence(self, draw: random.Random) -> list[int]:
        """Return LENGTH tokens."""
        tokens = [draw.randrange(self.vocabulary), draw.randrange(self.vocabulary)]
        while len(tokens) < LENGTH:
            choices = self._followers[tokens[-2] % 4, tokens[-1]]
            tokens += draw.choices(choices, PROBABILITIES)
        return tokens

    def batch(self, name: str, size: int) -> list[list[int]]:
        """Return `size` sentences that depend on `name` alone."""
        draw = random.Random(f"batch {name}")
        return [self.sentence(draw) for _ in range(size)]


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"model": {"dtype": "float32"}},
    "bf16": {},
    "blockwise": {"fp8": {"recipe": "blockwise"}},
    "blockwise, fp32 scales": {"fp8": {"recipe": "blockwise", "scales": "float32"}},
    "tensorwise": {"fp8": {"recipe": "tensorwise"}},
    "mxfp8": {"fp8": {"recipe": "mxfp8"}},
}
BASELINE = "bf16"
"""The numerics with which the DeepSeek-V3 report compares FP8 (appendix B.1)."""

MODEL: dict[str, Any] = json.loads(Path(__file__).with_name("config.json").read_text())
SHARED_SETTINGS: dict[str, Any] = {
    "model": {"dtype": "bfloat16", "init": "random", "init_std": 0.03, "mtp": "none"},
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "parallel": {"tokens_per_microbatch": 4096},
}
WARMUP_STEPS = 10


def variant_settings(variant: str, model_folder: str, seed: int, threads: int) -> dict[str, Any]:
    """Return the recipe of `variant` for megatron_r1.config.parse.

    Args:
        variant: one of `VARIANTS`.
        model_folder: the folder with config.json.
        seed: `run.seed`.
        threads: `parallel.threads`."""
    tree = {section: dict(values) for section, values in SHARED_SETTINGS.items()}
    for section, values in VARIANTS[variant].items():
        tree.setdefault(section, {}).update(values)
    tree["model"]["path"] = model_folder
    tree["parallel"]["threads"] = threads
    tree["run"] = {"seed": seed}
    return tree


COLUMNS = (
    "{:24}{:>10}{:>12}{:>12}{:>12}{:>14}{:>12}{:>10}",
    ("", "held out", "mean", "|mean|", "largest", "|dlogp| mean", "max", "s/step"),
)
SMOOTHING = 0.9
"""Curves are compared as in the DeepSeek-V3 report, appendix B.1: smoothed by an exponential moving
average with this coefficient; the FP8 one's relative error stays within 0.25% there (16B and 230B
parameters, a trillion tokens)."""


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--sentences", type=int, default=16, help="of 64 tokens, a step")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--only", action="append", choices=VARIANTS, help="repeatable")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return losses, held-out loss and distance from bf16 by variant and seed, with a summary."""
    names = [n for n in VARIANTS if not args.only or n in args.only or n == BASELINE]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODEL))
        runs = _run_variants(names, args, folder)
    summary = _summarize_runs(names, runs, args.seeds)
    print(f"loss after {args.steps} steps, {args.seeds} seeds; the language's: {ENTROPY:.3f}")
    print(f"relative loss error: second half of training, against {BASELINE}, smoothed")
    print(COLUMNS[0].format(*COLUMNS[1]))
    for name, row in summary.items():
        print(COLUMNS[0].format(name, *_summary_cells(row)))
    sizes = {"steps": args.steps, "seeds": args.seeds, "sentences": args.sentences}
    return {**sizes, "entropy": ENTROPY, "model": MODEL, "summary": summary, "runs": runs}


def _run_variants(
    names: list[str], args: argparse.Namespace, folder: str
) -> dict[str, list[dict[str, Any]]]:
    """Return the report of every seed, by variant; exit if a run fails."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    tasks = [(name, seed) for seed in range(args.seeds) for name in names]
    with ThreadPoolExecutor(args.jobs) as threads:
        try:
            reports = threads.map(lambda task: _run_worker(args, folder, *task), tasks)
            for (name, seed), report in zip(tasks, reports, strict=True):
                runs[name].append(report)
                heldout = report["heldout_loss"]
                print(f"{name}, seed {seed}: held out {heldout:.4f}", file=sys.stderr)
        finally:
            threads.shutdown(cancel_futures=True)
    return runs


def _run_worker(args: argparse.Namespace, folder: str, name: str, seed: int) -> dict[str, Any]:
    """Run the worker of one variant and seed; return its report."""
    sizes = {"steps": args.steps, "sentences": args.sentences, "threads": args.threads}
    task = {"variant": name, "seed": seed, "model": f"{folder}/model", **sizes}
    command = [sys.executable, "-m", "tools.bench.fp8.worker", json.dumps(task)]
    output = run_to_end(command, OMP_NUM_THREADS=str(args.threads))
    return json.loads(output.splitlines()[-1])


def _summarize_runs(
    names: list[str], runs: dict[str, list[dict[str, Any]]], num_seeds: int
) -> dict[str, dict[str, Any]]:
    summary = {}
    for name in names:
        pairs = list(zip(runs[name], runs[BASELINE], strict=True))
        errors = [
            relative_error_summary(tested["losses"], reference["losses"])
            for tested, reference in pairs
        ]
        heldout = [
            tested["heldout_loss"] / reference["heldout_loss"] - 1 for tested, reference in pairs
        ]
        summary[name] = {
            "heldout_loss": mean(r["heldout_loss"] for r in runs[name]),
            "heldout_error": heldout,
            "loss_error": {key: [e[key] for e in errors] for key in errors[0]},
            "logprob_diff_mean": mean(r["logprob_diff"]["mean"] for r in runs[name]),
            "logprob_diff_max": max(r["logprob_diff"]["max"] for r in runs[name]),
            "seconds_per_step": mean(r["seconds_per_step"] for r in runs[name]),
        }
    return summary


def _summary_cells(row: dict[str, Any]) -> list[str]:
    error = row["loss_error"]
    return [
        f"{row['heldout_loss']:.4f}",
        f"{mean(error['mean']):+.3%}",
        f"{mean(error['mean_magnitude']):.3%}",
        f"{max(error['largest']):.3%}",
        f"{row['logprob_diff_mean']:.2e}",
        f"{row['logprob_diff_max']:.2e}",
        f"{row['seconds_per_step']:.2f}",
    ]


def exponential_average(losses: list[float]) -> list[float]:
    """Return the exponential moving average, started at the first loss."""
    averages, average = [], losses[0]
    for loss in losses:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average)
    return averages


def relative_errors(losses: list[float], baseline: list[float]) -> list[float]:
    """Return (smoothed loss - smoothed baseline) / smoothed baseline of every step."""
    pairs = zip(exponential_average(losses), exponential_average(baseline), strict=True)
    return [
        (tested_loss - reference_loss) / reference_loss for tested_loss, reference_loss in pairs
    ]


def relative_error_summary(losses: list[float], baseline: list[float]) -> dict[str, float]:
    """Return mean, mean magnitude and largest magnitude of the relative errors, as fractions, over
    the second half of training."""
    errors = relative_errors(losses, baseline)
    late_errors = errors[len(errors) // 2 :]
    return {
        "mean": mean(late_errors),
        "mean_magnitude": mean(map(abs, late_errors)),
        "largest": max(map(abs, late_errors)),
    }
