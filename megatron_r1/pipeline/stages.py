"""A pipeline for one seed: the settings of each stage, and what references stand for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from megatron_r1 import config as configuration
from megatron_r1.base.errors import UserError
from megatron_r1.config import Config
from megatron_r1.pipeline.pipeline_recipe import (
    MAKE,
    PipelineRecipe,
    ServeConfig,
    StageConfig,
    read_tree,
)
from megatron_r1.pipeline.references import (
    REFERENCE_PATTERN,
    iter_references,
    iter_texts,
    substitute_references,
)

FILE_SETTINGS = ("path", "data", "checkpoint")
"""Last parts of the names of settings that hold a file or folder."""
FIXED_REFERENCES = ("here", "pipeline.seed")
"""References that mean the same before and after a stage runs."""
INDEX = re.compile(r"\[\d+\]")
"""The number of an entry of a list in a key path such as sft.data[0].path."""


@dataclass(frozen=True)
class PipelineStage:
    """One stage of a pipeline.

    Attributes:
        name: the stage's name in the pipeline.
        config: the stage's entry in the pipeline's recipe.
        settings: sections of a recipe, or the arguments of a function, with references not yet
            replaced."""

    name: str
    config: StageConfig
    settings: dict[str, Any]

    @property
    def title(self) -> str:
        """The name in reports: the recipe's `title`, or the stage's name."""
        return self.config.title or self.name

    @property
    def is_function(self) -> bool:
        """Whether the stage calls a function instead of a verb."""
        return self.config.verb == MAKE

    @cached_property
    def all_settings(self) -> dict[str, Any]:
        """The settings of the stage, of its servers and of its launcher."""
        server_settings = {name: server.model_dump() for name, server in self.config.serve.items()}
        return {**self.settings, "serve": server_settings, "launch": self.config.launch}

    @cached_property
    def references(self) -> list[tuple[str, str]]:
        """Return (key path, name) of all references in `all_settings`."""
        return list(iter_references(self.all_settings))


@dataclass(frozen=True)
class PipelinePlan:
    """The stages of a pipeline for one seed.

    Attributes:
        path: the recipe's file.
        folder: the folder with this seed's stages.
        seed: `run.seed` of every stage that sets none.
        stages: the stages by name, in the recipe's order.
        stage_errors: stage → why its settings cannot be read; checking the plan raises an error
            with all of them."""

    path: Path
    folder: Path
    seed: int
    stages: dict[str, PipelineStage]
    stage_errors: dict[str, UserError] = field(default_factory=dict)

    @classmethod
    def from_recipe(
        cls,
        recipe: PipelineRecipe,
        path: str | Path,
        folder: Path,
        seed: int,
        implied: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Self:
        """Plan the stages of a recipe.

        Args:
            recipe: the pipeline's recipe.
            path: the recipe's file.
            folder: the folder for this seed's stages.
            seed: the seed of all stages that name none.
            implied: verb → sections that it sets by itself."""
        path, stages, stage_errors = Path(path), {}, {}
        for name, config in recipe.stages.items():
            if config.verb == MAKE:
                stages[name] = PipelineStage(name, config, dict(config.arguments))
                continue
            settings: dict[str, Any] = {}
            source = f"stages.{name}: recipe"
            try:
                if config.recipe:
                    settings = read_tree(path.parent / config.recipe, source)
                settings = merge_settings(
                    merge_settings(recipe.defaults, settings), config.settings
                )
            except UserError as error:
                if error.key == source:
                    error.key = f"stages.{name}.recipe"
                stage_errors[name] = error
            settings = merge_settings(settings, (implied or {}).get(config.verb, {}))
            run = settings.get("run")
            if run is None or isinstance(run, dict):  # anything else is refused by its verb's check
                settings["run"] = {"seed": seed, **(run or {}), "folder": str(folder / name)}
            stages[name] = PipelineStage(name, config, settings)
        return cls(path, folder, seed, stages, stage_errors)

    def folder_of(self, stage: str) -> Path:
        """Return where a stage of this seed writes its outputs and its stage.json."""
        return self.folder / stage

    def log_of(self, stage: str, server: str = "") -> Path:
        """Return the log file of a stage, or of one of its servers."""
        return self.folder / "logs" / f"{stage}{'.' if server else ''}{server}.log"

    def config(self, stage: PipelineStage, required: tuple[str, ...] = ()) -> Config:
        """Return a stage's settings as its verb will read them, with references unresolved.

        Args:
            stage: the pipeline stage.
            required: keys that must have a value.

        Raises:
            UserError: naming every mistake."""
        tree = substitute_references(stage.settings, self.unresolved)
        tree = {section: keys for section, keys in tree.items() if keys is not None}
        return configuration.from_tree(tree, f"{self.path}, stage {stage.name}", required)

    def unresolved(self, reference: str) -> Any:
        """Return a value of the right type for a reference: itself, but the seed for
        `pipeline.seed` and a URL for a served model."""
        if reference == "pipeline.seed":
            return self.seed
        if reference.startswith("serve."):
            return f"http://{reference.removeprefix('serve.').removesuffix('.url')}.served"
        return f"${{{reference}}}"

    def reference_value(self, reference: str, urls: Mapping[str, str]) -> Any:
        """Return the value of `${reference}`.

        Args:
            reference: the reference, without `${}`.
            urls: name of a served model → its address."""
        head, _, value_name = reference.partition(".")
        if head == "pipeline":
            return self.seed if value_name == "seed" else str(self.folder)
        if head == "here":
            return str(self.path.parent)
        if head == "serve":
            return urls[value_name.removesuffix(".url")]
        return str(self.folder_of(head) / value_name if value_name else self.folder_of(head))

    def resolve_here(self, text: str) -> str:
        """Return a text with `${here}` and `${pipeline.seed}` replaced; others stay as they are."""
        return REFERENCE_PATTERN.sub(
            lambda match: (
                str(self.reference_value(match[1], {}))
                if match[1] in FIXED_REFERENCES
                else match[0]
            ),
            text,
        )

    def named_files(self, stage: PipelineStage) -> list[tuple[str, str]]:
        """Return (key path, text) of every text of a stage that names an existing file or folder
        which no stage makes. A folder that the pipeline itself lies in is left out: every stage
        changes it."""
        server_settings = {
            f"serve.{name}.model": served_model.model
            for name, served_model in stage.config.serve.items()
        }
        file_settings = []
        for key_path, text in iter_texts({**stage.settings, **server_settings}):
            path = self.resolve_here(text)
            is_path = "/" in path or Path(path).suffix or names_a_file(key_path)
            if key_path == "run.folder" or not is_path or REFERENCE_PATTERN.search(path):
                continue
            if _is_existing_path(path) and not self.folder.resolve().is_relative_to(
                Path(path).resolve()
            ):
                file_settings.append((key_path, text))
        return file_settings

    def resolve(self, value: Any, urls: Mapping[str, str] | None = None) -> Any:
        """Return `value` with every reference replaced."""
        return substitute_references(value, lambda name: self.reference_value(name, urls or {}))

    def server(self, config: ServeConfig) -> ServeConfig:
        """Return a server's settings with references replaced."""
        return ServeConfig.model_validate(self.resolve(config.model_dump()))


def names_a_file(key_path: str) -> bool:
    """Return whether a setting such as model.path, data.heldout_path or sft.data[0].path holds a
    file or folder."""
    section, *keys = INDEX.sub("", key_path).split(".")
    # A benchmark's path may be its name on the hub.
    is_named = bool(keys) and all(key.rpartition("_")[2] in FILE_SETTINGS for key in keys)
    return is_named and section != "eval"


def merge_settings(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings key by key; `override` has precedence."""
    settings = dict(base)
    for key, value in override.items():
        base_value = settings.get(key)
        is_section = isinstance(value, Mapping) and isinstance(base_value, Mapping)
        settings[key] = merge_settings(base_value or {}, value) if is_section else value
    return settings


def _is_existing_path(text: str) -> bool:
    try:
        return "\n" not in text and Path(text).exists()
    except OSError:  # too long for a name
        return False
