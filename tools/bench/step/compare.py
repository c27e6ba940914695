"""Steps of megatron-r1 compared with TRL's, case by case. The runs of all systems take turns,
so that other load on the machine affects each. Every run is written down when it has ended, so
that the same command continues after a stop."""

import argparse
import itertools
import json
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_r1.base.files.jsonl import read_lines
from megatron_r1.base.processes.inspection import PeakMemory
from tools.bench import machine
from tools.bench.step.figures import Steps
from tools.bench.step.model import Tail, write_model
from tools.bench.step.systems import run_ours, run_trl
from tools.bench.step.work import StepWork, write_questions

WORKS = {"short": StepWork(limit=32), "long tail": StepWork(limit=256)}
# One core per role, so that rollout and training can hide behind each other.
APART = {"parallel": {"threads": 1, "share_prompts": True}, "rollout": {"threads": 1}}
AHEAD = {"rl": {"staleness": 1, "importance_cap": 2.0}}
FASTER: dict[str, dict] = {
    "parallel": {"processes": 2, "share_prompts": True},
    "rollout": {"engines": 2},
}
"""Settings that change only how fast a step is: of small models an engine and a trainer rank use a
core each better than one uses two."""
SETTINGS: dict[str, dict] = {"ours": FASTER, "in turns": APART, "overlapped": APART | AHEAD}
PEERS = {"trl": 1, "trl, 2 processes": 2}
"""TRL's processes, which share the cores."""
PEER_MICROBATCH = 32
"""Answers of a pretrained model that TRL trains at once: 128 in one process take 20 GiB."""
PRETRAINED, OVERLAP = "pretrained", "overlap"
CASES = (*WORKS, PRETRAINED, OVERLAP)


@dataclass(frozen=True)
class Case:
    """What all systems of a case are given. settings: ours, by the name of the system; peers: the
    number of TRL's processes, likewise. steps, peer_steps: measured in a run of megatron-r1 and of
    TRL, one of whose steps takes as long as several of megatron-r1 where responses are long."""

    work: StepWork
    model: Path
    questions: Path
    steps: int
    settings: dict[str, dict]
    peer_steps: int = 0
    peers: dict[str, int] = field(default_factory=dict)

    @property
    def systems(self) -> tuple[str, ...]:
        return (*self.settings, *self.peers)

    def run(self, system: str, folder: Path, python: str) -> Steps:
        """Run a system, ours in a new `folder`; return its steps but the first."""
        inputs = self.work, self.model, self.questions
        if system in self.settings:
            return run_ours(*inputs, folder, self.steps, self.settings[system])
        return run_trl(*inputs, self.peer_steps, python, self.peers[system])


Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""The records of finished runs by case and system."""


def measure(chosen: argparse.Namespace, about: dict[str, Any]) -> Runs:
    """Make the runs that `chosen.runs` does not have yet, and return all; after Ctrl-C those that
    have ended. about: what runs of one comparison have in common."""
    records = list(read_lines(chosen.runs)) if chosen.runs.exists() else []
    if records and records[0] != about:
        raise SystemExit(
            f"{chosen.runs}: its runs are of {records[0]}, these would be of {about}; delete it, "
            "or name another file with --runs"
        )
    chosen.runs.parent.mkdir(parents=True, exist_ok=True)
    if not records:
        _append(chosen.runs, about)
    made: Runs = defaultdict(list)
    for record in records[1:]:
        made[record["case"], record["system"]].append(record)
    with tempfile.TemporaryDirectory() as name:
        cases = {each: _case(each, Path(name), chosen) for each in chosen.cases}
        missing = [
            (each, system)
            for turn in range(chosen.repeats)
            for each, case in cases.items()
            for system in case.systems
            if len(made[each, system]) <= turn
        ]
        try:
            for number, (each, system) in enumerate(missing):
                record = _run(each, system, cases[each], Path(name) / f"{number}", chosen)
                _append(chosen.runs, record)
                made[each, system].append(record)
        except KeyboardInterrupt:
            print(f"stopped; the same command continues: finished runs are in {chosen.runs}")
    return made


def _case(name: str, folder: Path, chosen: argparse.Namespace) -> Case:
    """Write what the systems of a case are given, below `folder` but for a pretrained model."""
    if name == PRETRAINED:
        from tools.bench.step import pretrained  # here, as TRL's interpreter lacks what it imports

        work, questions, faster = pretrained.given(chosen, folder)
        work = replace(work, peer_microbatch=work.peer_microbatch or PEER_MICROBATCH)
        model = Path(chosen.pretrained).absolute()
        return Case(work, model, questions, 1, {"ours": faster}, 1, PEERS)
    model, questions = folder / "model", folder / "questions.jsonl"
    if not model.exists():
        write_model(model, Tail())
        write_questions(questions, 256)
    if name == OVERLAP:
        settings = {system: SETTINGS[system] for system in ("in turns", "overlapped")}
        return Case(WORKS["long tail"], model, questions, chosen.steps, settings)
    peer_steps = chosen.steps if name == "short" else max(2, chosen.steps // 3)
    given = WORKS[name], model, questions, chosen.steps, {"ours": FASTER}
    return Case(*given, peer_steps, PEERS)


def _run(
    name: str, system: str, case: Case, folder: Path, chosen: argparse.Namespace
) -> dict[str, Any]:
    load, worth = os.getloadavg()[0], machine.cores_worth()
    with PeakMemory(every_seconds=1.0) as peak:
        steps = case.run(system, folder, chosen.peer_python)
    seconds = ", ".join(f"{step['seconds']:.2f}" for step in steps)
    print(
        f"{name}, {system}: {seconds} s a step, {peak.gib:.1f} GiB; before it load {load:.1f}, "
        f"{machine.num_cores()} cores worth {worth:.1f}",
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
    found: dict[str, dict[str, Steps]] = defaultdict(dict)
    for (name, system), records in runs.items():
        if records:
            found[name][system] = list(itertools.chain(*(r["steps"] for r in records)))
    return found
