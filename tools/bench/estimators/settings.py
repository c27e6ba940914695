"""The settings of each algorithm next to the demo's recipe, and the pipeline that runs them all.

A setting that is not here is the demo's (examples/laptop/r1_zero.yaml) or else the algorithm's own
default (docs/algorithms.md)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.laptop import make_corpus
from tools.bench.children import ROOT

TEACHER = "grpo"
"""The algorithm whose model is the teacher of on-policy distillation."""


@dataclass(frozen=True)
class EstimatorChoice:
    """The settings that one estimator is compared with. settings: sections of a recipe. why: the
    reason that this size needs them."""

    settings: dict[str, Any] = field(default_factory=dict)
    why: str = ""


CHOICES: dict[str, EstimatorChoice] = {
    "grpo": EstimatorChoice(),
    "dapo": EstimatorChoice(),
    "dr_grpo": EstimatorChoice(),
    "gspo": EstimatorChoice(
        {"rl": {"clip_low": 0.015, "clip_high": 0.02}},
        "clips 50 times its source's. At this learning rate its own clips would leave no gradient "
        "to the mini-batches after the first",
    ),
    "cispo": EstimatorChoice(),
    "reinforce": EstimatorChoice(
        {"rl": {"minibatches": 4}},
        "as many updates as the others. The length of Adam's steps does not depend on the batch, "
        "so one a rollout would go a quarter of the way",
    ),
    "reinforce_pp": EstimatorChoice(),
    "rloo": EstimatorChoice(
        {"rl": {"minibatches": 4, "group_size": 16}},
        "as many answers and updates as the others, for the same reason",
    ),
    "ppo": EstimatorChoice(
        {"critic": {"learning_rate": 3.0e-4, "warmup_steps": 2}},
        "the critic's head begins with zeros, so it learns faster than the policy and two steps "
        "before it; these count",
    ),
    "on_policy_distillation": EstimatorChoice(
        {"teacher": {"path": f"${{{TEACHER}.hf}}", "dtype": "float32"}},
        f"the teacher is {TEACHER}'s model of the same run and seed",
    ),
}

LAPTOP = ROOT / "examples" / "laptop"
COMMON = {
    "model": {"path": "${base.hf}"},
    # Unlike the demo, evaluate only before the first and after the last step.
    "eval": {"every": 0, "samples": 4},
    "checkpoint": {"every": 10},
}


def write_corpus(folder: Path, seed: int) -> None:
    """Write the base model's base.jsonl as `python -m examples.laptop.demo --seed SEED` does."""
    make_corpus.write(Path(folder) / "base.jsonl", seed)


def recipe(steps: int) -> dict[str, Any]:
    """Return the recipe for `megatron-r1 pipeline`, without its folder.

    The demo's base model is trained once per seed, then one RL run per algorithm starts from it."""
    stages: dict[str, Any] = {
        "corpus": {
            "verb": "make",
            # Imported by the pipeline's child, which runs in the repository root.
            "function": "tools.bench.estimators.settings:write_corpus",
            "arguments": {"seed": "${pipeline.seed}"},
        },
        "base": {
            "verb": "sft",
            "recipe": str(LAPTOP / "base.yaml"),
            "settings": {"sft": {"data": "${corpus}/base.jsonl"}},
        },
    }
    for name, choice in CHOICES.items():
        settings = {**COMMON, **choice.settings, "run": {"steps": steps}}
        settings["rl"] = {"algorithm": name, **choice.settings.get("rl", {})}
        stages[name] = {"verb": "rl", "recipe": str(LAPTOP / "r1_zero.yaml"), "settings": settings}
    return {"stages": stages}
