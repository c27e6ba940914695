"""Which stage needs which: references are the edges, `after` those without a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from megatron_r1.errors import did_you_mean
from megatron_r1.workflow.plan import Stage

TRAINED = ("hf", "checkpoints", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
OUTPUTS = {
    "sft": TRAINED,
    "rl": TRAINED,
    "reward-model": TRAINED,
    "eval": ("eval.json", "samples.jsonl", "questions.jsonl"),
    "sample": ("sft.jsonl", "pairs.jsonl", "labels.jsonl", "samples.jsonl", "curation.json"),
}
"""What a verb is known to leave. Of others (make above all) a name is checked after they ran."""
VALUES = {"pipeline": ("folder", "seed"), "here": ("",)}


class Graph:
    """upstream: of every stage those it needs directly. order: all stages, each after those."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        """Raises ValueError with a line for every stage that refers to nothing, else for stages
        that need each other."""
        self.upstream, mistakes = {}, []
        for name, stage in stages.items():
            try:
                self.upstream[name] = _upstream(stage, stages)
            except ValueError as error:
                mistakes.append(str(error))
        if mistakes:
            raise ValueError("\n".join(mistakes))
        self.order = _ordered(self.upstream)

    def needs(self, stage: str) -> set[str]:
        """All that has to be done before `stage`."""
        found: set[str] = set()
        for name in self.upstream[stage]:
            found |= {name} | self.needs(name)
        return found

    def sorted(self, stages: Collection[str]) -> list[str]:
        return [name for name in self.order if name in stages]

    def depths(self) -> dict[str, int]:
        """The longest way to each stage, 0 for one that needs nothing."""
        depths: dict[str, int] = {}
        for name in self.order:
            depths[name] = 1 + max((depths[above] for above in self.upstream[name]), default=-1)
        return depths


def _upstream(stage: Stage, stages: Mapping[str, Stage]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for place, reference in stage.references:
        head, _, rest = reference.partition(".")
        where = f"stages.{stage.name}: {place}: ${{{reference}}}"
        if head in VALUES:
            if rest not in VALUES[head]:
                known = ", ".join(".".join(filter(None, (head, name))) for name in VALUES[head])
                raise ValueError(f"{where} is unknown; there is {known}")
        elif head == "serve":
            _check_served(stage, where, rest)
        else:
            _check_output(stages, where, head, rest)
            found[head] = None
    for name in stage.config.after:
        if name not in stages:
            raise ValueError(f"stages.{stage.name}: after: {_unknown_stage(name, stages)}")
        found[name] = None
    if stage.config.evaluates and stage.config.evaluates not in stages:
        unknown = _unknown_stage(stage.config.evaluates, stages)
        raise ValueError(f"stages.{stage.name}: evaluates: {unknown}")
    return tuple(found)


def _check_served(stage: Stage, where: str, rest: str) -> None:
    name, dot, what = rest.rpartition(".")
    if not dot or what != "url":
        raise ValueError(f"{where} is unknown; there is ${{serve.NAME.url}}")
    if name not in stage.config.serve:
        near = did_you_mean(name, stage.config.serve, "{}")
        served = ", ".join(stage.config.serve) or "nothing"
        raise ValueError(f"{where}: {name} is not in its serve{near or f'; it serves {served}'}")


def _check_output(stages: Mapping[str, Stage], where: str, head: str, rest: str) -> None:
    if head not in stages:
        raise ValueError(f"{where}: {_unknown_stage(head, stages)}")
    known = OUTPUTS.get(stages[head].config.verb)
    if rest and known and rest.partition("/")[0] not in known:
        near = did_you_mean(rest, known, "{}") or f"; it has {', '.join(known)}"
        raise ValueError(f"{where}: {stages[head].config.verb} leaves no {rest}{near}")


def _unknown_stage(name: str, stages: Iterable[str]) -> str:
    stages = list(stages)
    near = did_you_mean(name, stages, "{}") or f"; there are {', '.join(stages)}"
    return f"no stage is called {name}{near}"


def _ordered(upstream: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Kahn's algorithm; stages that could both be next come as they stand in the recipe."""
    order: list[str] = []
    left = list(upstream)
    while left:
        following = [name for name in left if all(above in order for above in upstream[name])]
        if not following:
            raise ValueError(f"stages need each other: {' → '.join(_cycle(upstream, left))}")
        order.append(following[0])
        left.remove(following[0])
    return order


def _cycle(upstream: Mapping[str, tuple[str, ...]], left: list[str]) -> list[str]:
    """A way round among stages that all wait for one of each other, first and last the same."""
    way = [left[0]]
    while way[-1] not in way[:-1]:
        way.append(next(above for above in upstream[way[-1]] if above in left))
    return way[way.index(way[-1]) :][::-1]
