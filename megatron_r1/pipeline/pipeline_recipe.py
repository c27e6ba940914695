"""A pipeline's recipe: its stages and settings, typed; references may stand in it."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.files.access import Readers
from megatron_r1.config.section import Section
from megatron_r1.config.validation_errors import recipe_error
from megatron_r1.config.yaml_text import read_sections, set_nested
from megatron_r1.pipeline.references import escape_references, unescape_references

MAKE = "make"
"""The verb of a stage that calls a Python function."""
RESERVED_STAGE_NAMES = ("here", "logs", "pipeline", "recipes", "serve")
STAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class PipelineConfig(Section):
    """Folder, seeds and order of a pipeline."""

    folder: str = Field("", description="where everything of this pipeline is written; required")
    readable_by: Readers = "owner"
    """who else may read the folder; each stage has its own `run.readable_by`"""
    title: str = Field("", description="title of the report; default: the folder's name")
    seed: int = Field(0, description="run.seed of every stage that sets none")
    seeds: list[int] = Field([], description="the whole graph once for each, in FOLDER/seed_N")
    jobs: int = Field(1, ge=1)
    """how many stages may run at a time, each with the cores or GPUs it finds, or with those of its
    launch"""
    only: str = Field("", description="run this stage alone")
    until: str = Field("", description="run this stage and what it needs")
    status: bool = Field(False, description="print what is done and what is not; run nothing")
    rerun: bool = Field(False, description="move stale stages aside, to STAGE.old-N, and redo them")
    dry: bool = Field(False, description="write the stages' recipes and print their commands")

    @field_validator("seeds", mode="before")
    @classmethod
    def _from_text(cls, seeds: Any) -> Any:
        """`--pipeline.seeds 0,1,2` arrives as text, `--pipeline.seeds 3` as a number."""
        if isinstance(seeds, str):
            return [seed.strip() for seed in seeds.split(",") if seed.strip()]
        return [seeds] if isinstance(seeds, int) else seeds

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"pipeline.seeds: {seeds} has one twice; leave it out",
                key="pipeline.seeds",
                cause=Cause.DUPLICATE,
            )
        return seeds

    @model_validator(mode="after")
    def _one_choice(self):
        if self.only and self.until:
            raise UserError(
                f"pipeline.only {self.only} and pipeline.until {self.until}: choose one of them",
                key="pipeline.until",
                cause=Cause.CONFLICT,
            )
        return self


class ServeConfig(Section):
    """A model that is served while the stage that names it runs."""

    model: str = Field("", description="folder of the model that vLLM serves, under this name")
    task: Literal["generate", "classify"] = "generate"
    """classify: a reward model's scores, by /classify"""
    arguments: list[str] = Field([], description="further arguments of vLLM's server")
    command: list[str] = []
    """a server of another kind, instead of model; {port}, {host} stand for its own"""
    health: str = Field("/health", description="path that answers 200 once it is ready")
    host: str = "127.0.0.1"
    """address it listens at; a stage on other machines wants this one's"""
    launch: str = Field("", description="command prefix, such as env CUDA_VISIBLE_DEVICES=7")
    timeout_seconds: float = Field(600.0, gt=0, description="time in which it must be ready")

    @field_validator("arguments", "command", mode="before")
    @classmethod
    def _as_text(cls, words: Any) -> Any:
        return [str(word) for word in words] if isinstance(words, list) else words

    @model_validator(mode="after")
    def _one_of_both(self):
        if bool(self.model) == bool(self.command):
            raise UserError(
                "serve: set model (vLLM serves it) or command, one of the two",
                key="command" if self.command else "model",
                cause=Cause.CONFLICT if self.command else Cause.MISSING,
            )
        return self


class StageConfig(Section):
    """A stage as written: its verb, settings, served models and stages before it."""

    verb: str = Field(description="what runs: sft, rl, eval, …, or make")
    recipe: str = Field("", description="settings to begin with; relative to the pipeline's recipe")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="sections that override recipe's"
    )
    function: str = ""
    """what make calls: package.module:name, as name(folder, …)"""
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of make's function"
    )
    after: list[str] = Field(default_factory=list, description="stages it needs no file of")
    title: str = Field("", description="what the report calls it; default: its name")
    evaluates: str = ""
    """stage whose row shows its figures; default for eval: the stage that model.path is of"""
    serve: dict[str, ServeConfig] = {}
    """models served while it runs, at ${serve.NAME.url}"""
    launch: str = Field("", description="command prefix, such as srun -n1 or sbatch --wait FILE")

    @model_validator(mode="after")
    def _fits_its_verb(self):
        wrong_names = ("recipe", "settings") if self.verb == MAKE else ("function", "arguments")
        for name in wrong_names:
            if getattr(self, name):
                right_name = "arguments" if self.verb == MAKE else "settings"
                suggestion = "" if self.verb == MAKE else did_you_mean(self.verb, [MAKE], "{}")
                raise UserError(
                    f"{name} is not for verb {self.verb}{suggestion or f'; it has {right_name}'}",
                    key=name,
                    cause=Cause.CONFLICT,
                )
        if self.verb == MAKE and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise UserError(
                f"function: make needs one, as package.module:name, got {self.function!r}",
                key="function",
                cause=Cause.MALFORMED if self.function else Cause.MISSING,
            )
        return self


class PipelineRecipe(Section):
    """A whole pipeline as written: its settings, and its stages by name.

    Attributes:
        pipeline: folder, seeds and order.
        defaults: sections that every stage overrides.
        stages: the stages by name."""

    pipeline: PipelineConfig = PipelineConfig()
    defaults: dict[str, Any] = Field({}, description="sections that every stage overrides")
    stages: dict[str, StageConfig] = Field(min_length=1, description="{name: a stage}")


def load_pipeline(path: str | Path, overrides: dict[str, Any] | None = None) -> PipelineRecipe:
    """Read a pipeline's recipe and apply `{"pipeline.key": …, "stages.NAME.section.key": …}`.

    `${…}` may stand in it without quotes, also within braces.

    Raises:
        UserError: a mistake in the recipe; it names all of them.
    """
    tree = read_tree(Path(path), "pipeline recipe")
    if "stages" not in tree:
        raise UserError(
            f"{path}: it has no stages; a recipe of one is run with its verb, such as megatron-r1 "
            f"rl {path}",
            key="stages",
            cause=Cause.MISSING,
        )
    for dotted_key, value in (overrides or {}).items():
        set_nested(tree, _nested_keys(tree, dotted_key), value, dotted_key)
    try:
        recipe = PipelineRecipe.model_validate(tree)
    except ValidationError as failure:
        raise recipe_error(failure, PipelineRecipe, origin=str(path)) from None
    if not recipe.pipeline.folder:
        raise UserError(
            f"{path}: pipeline.folder must be set", key="pipeline.folder", cause=Cause.MISSING
        )
    for name in recipe.stages:
        if (
            not STAGE_NAME.fullmatch(name)
            or name in RESERVED_STAGE_NAMES
            or re.fullmatch(r"seed_\d+", name)
        ):
            raise UserError(
                f"{path}: stages.{name}: a stage cannot be called so; use letters, digits, _ "
                f"and -, and none of {', '.join(RESERVED_STAGE_NAMES)}, seed_N",
                key=f"stages.{name}",
                cause=Cause.MALFORMED,
            )
    return recipe


def read_tree(path: Path, source: str = "recipe") -> dict[str, Any]:
    """Read the sections of a YAML file in which references may stand; see `read_sections`.

    Raises:
        UserError: the file cannot be read, or is no mapping of sections.
    """
    try:
        return unescape_references(read_sections(path, source, escape_references))
    except UserError as error:
        raise UserError(unescape_references(str(error)), key=error.key, cause=error.cause) from None


def _nested_keys(tree: dict[str, Any], dotted: str) -> list[str]:
    """Return the nested keys that an option means: `stages.NAME.rl.group_size` is in the stage's
    settings, or in the arguments of its function."""
    section, *keys = dotted.split(".")
    if section not in PipelineRecipe.model_fields:
        hint = did_you_mean(section, PipelineRecipe.model_fields, "--{}")
        raise UserError(
            f"unknown option --{dotted}{hint}; a pipeline has --pipeline.KEY, "
            "--stages.NAME.SECTION.KEY and --defaults.SECTION.KEY",
            key=f"--{dotted}",
            cause=Cause.UNKNOWN,
        )
    if section != "stages":
        return [section, *keys]
    stages, (name, *stage_keys) = tree.get("stages") or {}, keys
    if name not in stages:
        raise UserError(
            f"--{dotted}: no stage is called {name}{did_you_mean(name, stages, '{}')}; there are "
            f"{', '.join(stages)}",
            key=f"--{dotted}",
            cause=Cause.UNKNOWN,
        )
    if not stage_keys:
        raise UserError(
            f"--{dotted}: a setting is --stages.{name}.SECTION.KEY value",
            key=f"--{dotted}",
            cause=Cause.MALFORMED,
        )
    if stage_keys[0] in StageConfig.model_fields:
        return [section, *keys]
    verb = stages[name].get("verb") if isinstance(stages[name], dict) else None
    return [section, name, "arguments" if verb == MAKE else "settings", *stage_keys]
