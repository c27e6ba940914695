"""The bench as a pipeline: the demo's base model once a seed, then one RL run per algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .settings import CHOICES

LAPTOP = Path(__file__).parents[3] / "examples" / "laptop"
CORPUS = (
    "tools.bench.estimators.demo_corpus:write"  # as the pipeline's child finds it, from the root
)
COMMON = {
    "model": {"path": "${base.hf}"},
    # The demo looks on its way; here the steps' own answers tell, and only the end is looked at.
    "eval": {"every": 0, "samples": 4},
    "checkpoint": {"every": 10},
}


def recipe(steps: int) -> dict[str, Any]:
    """The recipe of `megatron-r1 pipeline`, its folder left out."""
    stages: dict[str, Any] = {
        "corpus": {
            "verb": "make",
            "function": CORPUS,
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
        stages[name] = {
            "verb": "rl",
            "recipe": str(LAPTOP / "r1_zero.yaml"),
            "settings": settings,
        }
    return {"stages": stages}
