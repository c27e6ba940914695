"""Steps of megatron-r1 compared with TRL's, case by case, and the published figures of single
steps, as a table and as docs/benchmarks/step.md. Cases: a toy model, and a pretrained one with
the questions, template and limits of examples/smollm2, in fp32, with the most memory that all
processes of a run hold together.

The runs of all systems take turns, so that other load on the machine affects each. Every run is
written down when it has ended, so that the same command continues after a stop. megatron-r1 runs
the pretrained model with that recipe's `parallel.share_prompts` and settings of the engine."""

import argparse
import datetime
import itertools
import json
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from examples.smollm2.questions import write
from megatron_r1 import config as configuration
from megatron_r1.base.files.json_lines import read_lines, write_lines
from megatron_r1.base.processes.process_table import PeakMemory
from megatron_r1.config import Config
from tools.bench import host
from tools.bench.host import ROOT
from tools.bench.step.systems import run_ours, run_trl
from tools.bench.step.work import StepWork, Tail, write_model, write_questions

PAGE = Path(__file__).with_name("page.md.in")
Steps = list[dict[str, Any]]
"""One dictionary per step: "seconds" (wall clock), "core_seconds" and "response_tokens"."""
RATIOS = ("ratio", "ratios")
"""What a comparison has next to the figures of systems."""


def compare_systems(**systems: Steps) -> dict[str, Any]:
    """Return the medians of systems by name, and the ratio of the first's tokens per second to
    those of the best of the others."""
    system_medians = {name: medians(steps) for name, steps in systems.items()}
    first, *peers = (figures["tokens_per_second"] for figures in system_medians.values())
    return {**system_medians, "ratio": first / max(peers)}


def medians(steps: Steps) -> dict[str, float]:
    """Return the medians of the steps' seconds, core seconds, tokens and tokens per second, and the
    number of steps."""
    names = ("seconds", "core_seconds", "response_tokens")
    rates = [step["response_tokens"] / step["seconds"] for step in steps]
    middle = {name: median(step[name] for step in steps) for name in names}
    return {**middle, "tokens_per_second": median(rates), "steps": len(steps)}


def overlap_ratio(in_turns: Steps, at_once: Steps) -> dict[str, float]:
    """Return the overlapped step's ratio to the longer of rollout and training.

    Rollout and training are measured in the run in which they take turns. Training includes the
    push, for which an overlapped step waits too."""
    rollout = median(step["time/rollout"] + step["time/reward"] for step in in_turns)
    training = median(step["time/train"] + step["time/push"] for step in in_turns)
    step = median(step["seconds"] for step in at_once)
    return {
        "rollout": rollout,
        "training": training,
        "in_turns": median(step["seconds"] for step in in_turns),
        "overlapped": step,
        "ratio": step / max(rollout, training),
    }


def table(comparisons: dict[str, dict[str, Any]], overlap: dict[str, float] | None) -> str:
    """Return the comparisons with TRL and the overlapped steps as a table of plain text. The ratio
    of each of TRL's rows is ours to it."""
    row = "{:12}{:18}{:>10}{:>14}{:>10}{:>12}{:>8}"
    lines = [row.format("", "", "s/step", "core s/step", "tokens", "tokens/s", "ratio")]
    for name, comparison in comparisons.items():
        rate = comparison["ours"]["tokens_per_second"]
        for system, figures in comparison.items():
            if system in RATIOS:
                continue
            ratio = rate / figures["tokens_per_second"]
            cells = [f"{figures[key]:.2f}" for key in ("seconds", "core_seconds")]
            cells += [f"{figures[key]:,.0f}" for key in ("response_tokens", "tokens_per_second")]
            lines.append(row.format(name, system, *cells, f"{ratio:.2f}" * (system != "ours")))
    if overlap is None:
        return "\n".join(lines)
    lines.append(
        "a core each, long tail: rollout {rollout:.2f} s, training and push {training:.2f} s; in "
        "turns {in_turns:.2f} s, overlapped {overlapped:.2f} s = {ratio:.2f} x the slower".format(
            **overlap
        )
    )
    return "\n".join(lines)


def summary(processor: str, comparisons: dict[str, dict[str, Any]]) -> str:
    """Return the ratios to TRL's tokens per second, on the clock and by processor time, each to the
    better of TRL's runs, one line for each of `comparisons`. Behind it the least and the greatest
    ratio of the rounds, each of one run of every system."""
    lines = [f"{processor}: tokens a second beside TRL's, medians of all runs"]
    for name, comparison in comparisons.items():
        own_system, *peers = (
            figures["response_tokens"] / figures["core_seconds"]
            for system, figures in comparison.items()
            if system not in RATIOS
        )
        ratios = comparison.get("ratios", [comparison["ratio"]])
        lines.append(
            f"{name:12}{comparison['ratio']:6.2f} x on the clock ({min(ratios):.2f} to "
            f"{max(ratios):.2f} in {len(ratios)} rounds)"
            f"{own_system / max(peers):7.2f} x by processor time"
        )
    return "\n".join(lines)


def as_page(result: dict[str, Any], cores: int) -> str:
    """Return the page `docs/benchmarks/step.md`.

    Args:
        result: the content of the benchmark's JSON file.
        cores: the number of CPU cores."""
    work = result["work"]
    return PAGE.read_text(encoding="utf-8").format(
        date=datetime.date.today().isoformat(),
        processor=result["processor"],
        cores=cores,
        load=" to ".join(f"{limit:.1f}" for limit in result["load"]),
        worth=" to ".join(f"{limit:.1f}" for limit in result["cores are worth"]),
        packages=", ".join(f"{name} {version}" for name, version in result["packages"].items()),
        long=work["long tail"],
        short=work["short"],
        repeats=result["repeats"],
        gib="; ".join(f"{name} {gib:.1f}" for name, gib in result["gib"].items()),
        summary=summary(result["processor"], result["comparisons"]),
        table=table(result["comparisons"], result["overlap"]),
    )


PRETRAINED_RECIPE = ROOT / "examples/smollm2/rl.yaml"
SYSTEMS = ("ours", "trl")


def run_pretrained(args: argparse.Namespace) -> dict[str, Any]:
    """Return medians of each system, with every step they come from."""
    steps: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    peaks: dict[str, list[float]] = {system: [] for system in steps}
    loads, worth = [], []
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(args.model).absolute()
        work, questions, settings = pretrained_settings(args, folder)
        for turn, system in enumerate([*steps] * args.repeats):
            loads.append(os.getloadavg()[0])
            worth.append(host.cores_worth())
            with PeakMemory(every_seconds=1.0) as peak:
                inputs = work, model, questions
                if system == "trl":
                    lines = run_trl(*inputs, args.steps, args.peer_python)
                else:
                    lines = run_ours(*inputs, folder / f"{turn}", args.steps, settings)
            steps[system] += lines
            peaks[system].append(peak.gib)
            seconds = ", ".join(f"{line['seconds']:.1f}" for line in lines)
            print(f"{system}: {seconds} s a step, {peak.gib:.1f} GiB", flush=True)
    system_medians = {
        name: medians(lines) | {"gib": max(peaks[name])} for name, lines in steps.items()
    }
    for name, figures in system_medians.items():
        rate = figures["tokens_per_second"]
        ratio = rate / system_medians["trl"]["tokens_per_second"]
        print(
            f"{name:20}{figures['seconds']:8.2f} s/step{figures['core_seconds']:8.2f} core s"
            f"{figures['response_tokens']:8,.0f} tokens{rate:8.1f} tokens/s"
            f"{figures['gib']:7.1f} GiB{ratio:7.2f}"
        )
    return {
        "loads": loads,
        "cores are worth": worth,
        "work": vars(work),
        "medians": system_medians,
        "peaks": peaks,
        "steps": steps,
    }


def pretrained_settings(
    args: argparse.Namespace, folder: Path
) -> tuple[StepWork, Path, dict[str, dict[str, Any]]]:
    """Return the work, the file of its questions, below `folder`, and our settings."""
    recipe = configuration.load(PRETRAINED_RECIPE)
    options = {"limit": args.limit, "questions": args.questions}
    work = replace(
        pretrained_work(recipe),
        peer_microbatch=args.peer_microbatch,
        **{key: value for key, value in options.items() if value},
    )
    return work, write_prompts(folder, recipe.data.template), speed_settings_of(recipe)


def pretrained_work(recipe: Config) -> StepWork:
    """Return the recipe's part of the work that both systems share."""
    return StepWork(
        limit=recipe.rollout.max_response_tokens,
        questions=recipe.rl.prompts_per_rollout,
        group=recipe.rl.group_size,
        minibatches=recipe.rl.minibatches,
        kl_beta=recipe.rl.kl_beta,
    )


def speed_settings_of(recipe: Config) -> dict[str, dict[str, Any]]:
    """Return the recipe's settings that change only how fast a step is."""
    engine = {"threads", "kv_block_tokens"}
    return {
        "parallel": {"share_prompts": recipe.parallel.share_prompts},
        "rollout": recipe.rollout.model_dump(include=engine),
    }


def write_prompts(folder: Path, template: str) -> Path:
    """Write the training questions in `template`, which TRL does not know, as work's questions."""
    write(str(folder))
    rows = [
        {
            "question": template.replace("{question}", row["question"]),
            "truth": row["truth"],
            "kind": "tools.bench.step.work:grade",
        }
        for row in read_lines(folder / "train.jsonl")
    ]
    return write_lines(folder / "prompts.jsonl", rows)


WORKS = {"short": StepWork(limit=32), "long tail": StepWork(limit=256)}
# One core per role, so that rollout and training can hide behind each other.
SEPARATE_CORES = {"parallel": {"threads": 1, "share_prompts": True}, "rollout": {"threads": 1}}
ROLLOUT_AHEAD = {"rl": {"staleness": 1, "importance_cap": 2.0}}
SPEED_SETTINGS: dict[str, dict[str, Any]] = {
    "parallel": {"processes": 2, "share_prompts": True},
    "rollout": {"engines": 2},
}
"""Settings that change only how fast a step is: of small models an engine and a trainer rank use a
core each better than one uses two."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": SPEED_SETTINGS,
    "in turns": SEPARATE_CORES,
    "overlapped": SEPARATE_CORES | ROLLOUT_AHEAD,
}
PEERS = {"trl": 1, "trl, 2 processes": 2}
"""TRL's processes, which share the cores."""
PEER_MICROBATCH = 32
"""Answers of a pretrained model that TRL trains at once: 128 in one process take 20 GiB."""
PRETRAINED, OVERLAP = "pretrained", "overlap"
CASES = (*WORKS, PRETRAINED, OVERLAP)


@dataclass(frozen=True)
class Case:
    """What all systems of a case are given.

    Attributes:
        work: the sizes of a step.
        model: the model's folder.
        questions: the file of questions.
        steps: those measured in a run of megatron-r1.
        settings: ours, by the name of the system.
        peer_steps: those measured in a run of TRL, one of which takes as long as several of
            megatron-r1 where responses are long.
        peers: TRL's processes, by the name of the system."""

    work: StepWork
    model: Path
    questions: Path
    steps: int
    settings: dict[str, dict[str, Any]]
    peer_steps: int = 0
    peers: dict[str, int] = field(default_factory=dict)

    @property
    def systems(self) -> tuple[str, ...]:
        return (*self.settings, *self.peers)

    def run(self, system: str, folder: Path, python: str) -> Steps:
        """Run a system, ours in a new `folder`; return its steps but the first.

        Args:
            system: the name of the system.
            folder: the folder of the run.
            python: TRL's interpreter."""
        inputs = self.work, self.model, self.questions
        if system in self.settings:
            return run_ours(*inputs, folder, self.steps, self.settings[system])
        return run_trl(*inputs, self.peer_steps, python, self.peers[system])


Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""The records of finished runs by case and system."""


def measure(args: argparse.Namespace, about: dict[str, Any]) -> Runs:
    """Make the runs that are missing in the file `args.runs`, and return all; after Ctrl-C those
    that have ended.

    Args:
        args: the command's options.
        about: what runs of one comparison have in common."""
    records = list(read_lines(args.runs)) if args.runs.exists() else []
    if records and records[0] != about:
        raise SystemExit(
            f"{args.runs}: its runs are of {records[0]}, these would be of {about}; delete it, "
            "or name another file with --runs"
        )
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    if not records:
        _append(args.runs, about)
    runs: Runs = defaultdict(list)
    for record in records[1:]:
        runs[record["case"], record["system"]].append(record)
    with tempfile.TemporaryDirectory() as name:
        cases = {case_name: _case(case_name, Path(name), args) for case_name in args.cases}
        missing = [
            (case_name, system)
            for turn in range(args.repeats)
            for case_name, case in cases.items()
            for system in case.systems
            if len(runs[case_name, system]) <= turn
        ]
        try:
            for number, (case_name, system) in enumerate(missing):
                record = _run(case_name, system, cases[case_name], Path(name) / f"{number}", args)
                _append(args.runs, record)
                runs[case_name, system].append(record)
        except KeyboardInterrupt:
            print(f"stopped; the same command continues: finished runs are in {args.runs}")
    return runs


def _case(name: str, folder: Path, args: argparse.Namespace) -> Case:
    """Write what the systems of a case are given, below `folder` but for a pretrained model."""
    if name == PRETRAINED:
        work, questions, faster = pretrained_settings(args, folder)
        work = replace(work, peer_microbatch=work.peer_microbatch or PEER_MICROBATCH)
        model = Path(args.pretrained).absolute()
        return Case(work, model, questions, 1, {"ours": faster}, 1, PEERS)
    model, questions = folder / "model", folder / "questions.jsonl"
    if not model.exists():
        write_model(model, Tail())
        write_questions(questions, 256)
    if name == OVERLAP:
        settings = {system: SETTINGS[system] for system in ("in turns", "overlapped")}
        return Case(WORKS["long tail"], model, questions, args.steps, settings)
    peer_steps = args.steps if name == "short" else max(2, args.steps // 3)
    arguments = WORKS[name], model, questions, args.steps, {"ours": SPEED_SETTINGS}
    return Case(*arguments, peer_steps, PEERS)


def _run(
    name: str, system: str, case: Case, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    load, worth = os.getloadavg()[0], host.cores_worth()
    with PeakMemory(every_seconds=1.0) as peak:
        steps = case.run(system, folder, args.peer_python)
    seconds = ", ".join(f"{step['seconds']:.2f}" for step in steps)
    print(
        f"{name}, {system}: {seconds} s a step, {peak.gib:.1f} GiB; before it load {load:.1f}, "
        f"{host.num_cores()} cores worth {worth:.1f}",
        flush=True,
    )
    return {
        **{"case": name, "system": system, "load": load, "worth": worth, "gib": peak.gib},
        "steps": steps,
    }


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def steps_of(runs: Runs) -> dict[str, dict[str, Steps]]:
    """Return the steps of all runs, by case and system."""
    steps: dict[str, dict[str, Steps]] = defaultdict(dict)
    for (name, system), records in runs.items():
        if records:
            steps[name][system] = list(itertools.chain(*(r["steps"] for r in records)))
    return steps


def compare_runs(runs: Runs, name: str) -> dict[str, Any]:
    """Return a case's systems compared over all their runs (`compare_systems`), with "ratios", that
    of each round of one run of every system."""
    systems = ("ours", *PEERS)
    rounds = zip(*(runs[name, system] for system in systems), strict=False)
    ratios = [
        compare_systems(**{s: run["steps"] for s, run in zip(systems, records, strict=True)})
        for records in rounds
    ]
    steps = steps_of(runs)[name]
    compared = compare_systems(**{system: steps[system] for system in systems})
    return {**compared, "ratios": [ratio["ratio"] for ratio in ratios]}
