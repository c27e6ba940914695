"""The records of the claims: docs/evidence/ID.json."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_r1.base.files import atomic_write

FOLDER = "docs/evidence"
TOPICS = {
    "numbers": "Numbers that agree",
    "learning": "Models that learn",
    "survival": "Runs that survive",
    "speed": "Speed",
}


@dataclass(frozen=True)
class Measured:
    """A run of the command whose figure the page shows.

    figure: What was read out of the output.
    commit: The tree that was measured; of figures from before 2026-11-26, which were written by
        hand, the commit that put the figure into the repository.
    machine: Processor, cores, memory and what else is known to matter.
    """

    figure: str
    commit: str
    date: str
    machine: str


@dataclass(frozen=True)
class Failed:
    """A later run that gave no figure.

    reason: Exit status, time limit, or what the output lacks.
    tail: The end of the output.
    """

    reason: str
    commit: str
    date: str
    machine: str
    tail: str


@dataclass(frozen=True)
class Claim:
    """One claim.

    topic: A key of `TOPICS`.
    claim: One sentence.
    page: Where it is explained, from the repository's root.
    command: A line for bash in the root, with the environment's programs first in the path.
    reads: Regular expressions with named groups; the last match of each in the output counts.
    figure: The text of the figure, with the groups in braces.
    bounds: By group, the lowest and the highest value with which the claim holds; None: no bound.
    paths: Files, folders (ending with "/") and patterns whose change makes the claim stale.
    seconds: What the last run took, or an estimate.
    """

    id: str
    topic: str
    claim: str
    page: str
    command: str
    reads: list[str]
    figure: str
    paths: list[str]
    seconds: float
    bounds: dict[str, list[float | None]] = field(default_factory=dict)
    measured: Measured | None = None
    failed: Failed | None = None


def read(root: Path) -> list[Claim]:
    """Return the claims, by topic and name."""
    claims = []
    for path in sorted((root / FOLDER).glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in (("measured", Measured), ("failed", Failed)):
            if values.get(key):
                values[key] = kind(**values[key])
        claim = Claim(**values)
        if claim.id != path.stem or claim.topic not in TOPICS:
            raise ValueError(f"{path}: id {claim.id!r} or topic {claim.topic!r} is wrong")
        claims.append(claim)
    topics = list(TOPICS)
    return sorted(claims, key=lambda claim: (topics.index(claim.topic), claim.id))


def write(root: Path, claim: Claim) -> None:
    """Write a claim's file, whole or not at all."""
    values = {key: value for key, value in asdict(claim).items() if value not in (None, {})}
    path = root / FOLDER / f"{claim.id}.json"
    atomic_write(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
