"""The cases in which systems are compared, each with a model, questions and settings: a toy model
with short responses or a long tail, a pretrained one, and overlapped rollouts."""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools.bench.step.figures import Steps
from tools.bench.step.pretrained import pretrained_settings
from tools.bench.step.systems import PEERS, run_ours, run_trl
from tools.bench.step.work import StepWork, Tail, write_model, write_questions

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
PEER_MICROBATCH = 32
"""Answers of a pretrained model that TRL trains at once: 128 in one process take 20 GiB."""
PRETRAINED, OVERLAP = "pretrained", "overlap"
CASES = (*WORKS, PRETRAINED, OVERLAP)


@dataclass(frozen=True)
class StepCase:
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


def make_case(name: str, folder: Path, args: argparse.Namespace) -> StepCase:
    """Write what the systems of a case are given, below `folder` but for a pretrained model.

    Args:
        name: one of `CASES`.
        folder: the folder of models and questions.
        args: the command's options."""
    if name == PRETRAINED:
        work, questions, faster = pretrained_settings(args, folder)
        work = replace(work, peer_microbatch=work.peer_microbatch or PEER_MICROBATCH)
        model = Path(args.pretrained).absolute()
        return StepCase(work, model, questions, 1, {"ours": faster}, 1, PEERS)
    model, questions = folder / "model", folder / "questions.jsonl"
    if not model.exists():
        write_model(model, Tail())
        write_questions(questions, 256)
    if name == OVERLAP:
        settings = {system: SETTINGS[system] for system in ("in turns", "overlapped")}
        return StepCase(WORKS["long tail"], model, questions, args.steps, settings)
    peer_steps = args.steps if name == "short" else max(2, args.steps // 3)
    arguments = WORKS[name], model, questions, args.steps, {"ours": SPEED_SETTINGS}
    return StepCase(*arguments, peer_steps, PEERS)
