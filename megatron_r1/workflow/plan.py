"""A pipeline for one seed: what each stage is told, and what references stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_r1.workflow.recipe import MAKE, Recipe, ServeConfig, StageConfig, read_tree
from megatron_r1.workflow.references import references, substitute


@dataclass(frozen=True)
class Stage:
    """One stage. told: its sections of settings, of make the function's arguments; references
    stand in it as they were written."""

    name: str
    config: StageConfig
    told: dict[str, Any]

    @property
    def title(self) -> str:
        return self.config.title or self.name

    @property
    def is_function(self) -> bool:
        return self.config.verb == MAKE

    @cached_property
    def everything(self) -> dict[str, Any]:
        """What it is told, its servers and its launcher included."""
        served = {name: server.model_dump() for name, server in self.config.serve.items()}
        return {**self.told, "serve": served, "launch": self.config.launch}

    @cached_property
    def references(self) -> list[tuple[str, str]]:
        """(place, name) of all references in `everything`."""
        return list(references(self.everything))


@dataclass(frozen=True)
class Plan:
    """The stages of one seed. path: of the recipe; folder: where this seed's stages are. Nothing
    can be done with it while some are `broken` (`check.check`)."""

    path: Path
    folder: Path
    seed: int
    stages: dict[str, Stage]
    broken: dict[str, str] = field(default_factory=dict)
    """Name → why it cannot be read."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        path: str | Path,
        folder: Path,
        seed: int,
        implied: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Plan:
        """implied: verb → sections that it sets by itself. Stages whose own recipe is not there, or
        no YAML, are in `broken`."""
        path, stages, broken = Path(path), {}, {}
        for name, config in recipe.stages.items():
            try:
                told = _told(recipe, path, name, config)
            except ValueError as error:
                told, broken[name] = {}, str(error)
            if config.verb != MAKE:
                told = merged(told, (implied or {}).get(config.verb, {}))
                _put_run(told, folder / name, seed)
            stages[name] = Stage(name, config, told)
        return cls(path, folder, seed, stages, broken)

    def folder_of(self, stage: str) -> Path:
        return self.folder / stage

    def log_of(self, stage: str, server: str = "") -> Path:
        return self.folder / "logs" / f"{stage}{'.' if server else ''}{server}.log"

    def recipe_of(self, stage: str) -> Path:
        """The file its command is given: the settings with references resolved."""
        return self.folder / "recipes" / f"{stage}.yaml"

    def meaning(self, reference: str, urls: Mapping[str, str]) -> Any:
        """What `${reference}` stands for. urls: of the served models, by their names."""
        head, _, rest = reference.partition(".")
        if head == "pipeline":
            return self.seed if rest == "seed" else str(self.folder)
        if head == "here":
            return str(self.path.parent)
        if head == "serve":
            return urls[rest.removesuffix(".url")]
        return str(self.folder_of(head) / rest if rest else self.folder_of(head))

    def resolve(self, value: Any, urls: Mapping[str, str] | None = None) -> Any:
        """`value` with every reference replaced."""
        return substitute(value, lambda name: self.meaning(name, urls or {}))

    def server(self, config: ServeConfig) -> ServeConfig:
        """A server's settings with references replaced."""
        return ServeConfig.model_validate(self.resolve(config.model_dump()))


def _told(recipe: Recipe, path: Path, name: str, config: StageConfig) -> dict[str, Any]:
    if config.verb == MAKE:
        return dict(config.arguments)
    begin: dict[str, Any] = {}
    if config.recipe:
        begin = read_tree(path.parent / config.recipe, f"stages.{name}: recipe")
    return merged(merged(recipe.defaults, begin), config.settings)


def _put_run(told: dict[str, Any], folder: Path, seed: int) -> None:
    run = told.get("run")
    if run is None or isinstance(run, dict):  # anything else is refused by name, later
        told["run"] = {"seed": seed, **(run or {}), "folder": str(folder)}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined key by key; where both say something, `over` counts."""
    joined = dict(under)
    for key, value in over.items():
        below = joined.get(key)
        is_section = isinstance(value, Mapping) and isinstance(below, Mapping)
        joined[key] = merged(below, value) if is_section else value
    return joined
