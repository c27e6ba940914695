"""Our figures: from a pipeline's report.json, of stages that are done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.paper.tables import SECONDS, split
from megatron_r1.workflow.results import Spread


@dataclass(frozen=True)
class Results:
    """report: as `megatron-r1 pipeline` writes it."""

    report: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises ValueError where there is none."""
        if not path.is_file():
            raise ValueError(f"{path}: no pipeline has written it; run one first")
        return cls(json.loads(path.read_text(encoding="utf-8")))

    @property
    def seeds(self) -> list[str]:
        return [str(seed) for seed in self.report["seeds"]]

    def by_seed(self, reference: str) -> dict[str, float]:
        """Seed → value of `stage.figure`; a stage at work has figures too, and they are left
        out."""
        name, figure = split(reference)
        stage = self.report["stages"].get(name, {"by_seed": {}})
        found = {}
        for seed, run in stage["by_seed"].items():
            if run["state"] != "done":
                continue
            if figure == SECONDS:
                found[seed] = run["seconds"]
            elif figure in run["figures"]:
                found[seed] = run["figures"][figure]["value"]
        return found

    def spread(self, reference: str) -> Spread | None:
        values = self.by_seed(reference)
        return Spread.of(list(values.values())) if values else None

    def curve(self, reference: str) -> dict[int, dict[str, float]]:
        """Step → seed → value, of the figures `FIGURE@STEP` of `stage.FIGURE`."""
        name, figure = split(reference)
        known = self.report["stages"].get(name, {"figures": {}})["figures"]
        steps = sorted(int(key.split("@")[1]) for key in known if key.startswith(f"{figure}@"))
        found = {step: self.by_seed(f"{reference}@{step}") for step in steps}
        return {step: by_seed for step, by_seed in found.items() if by_seed}

    @property
    def progress(self) -> tuple[int, int, float]:
        """Stages done, of how many, in how many seconds."""
        runs = [
            run for stage in self.report["stages"].values() for run in stage["by_seed"].values()
        ]
        done = sum(run["state"] == "done" for run in runs)
        return done, len(runs), sum(run["seconds"] or 0.0 for run in runs)
