"""The runs that a recipe gives to rehearse: itself, or the stages of a pipeline that train or
sample."""

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config import Config, infer_verb
from megatron_r1.config.yaml_text import nest_keys
from megatron_r1.pipeline import pipeline_recipe
from megatron_r1.pipeline.graph import check_plan
from megatron_r1.pipeline.references import REFERENCE_PATTERN
from megatron_r1.pipeline.stages import PipelinePlan

VERBS = ("rl", "sft", "reward-model", "sample")


@dataclass(frozen=True)
class RehearsalJob:
    """One run.

    Attributes:
        name: the recipe's name, or the stage's.
        verb: the subcommand of megatron-r1.
        config: the recipe as its verb would read it, with a model.path that exists."""

    name: str
    verb: str
    config: Config


def rehearsal_jobs(
    path: str,
    overrides: Mapping[str, Any],
    verbs: Mapping[str, str],
    implied: Mapping[str, dict[str, Any]],
    only: Collection[str] = (),
) -> list[RehearsalJob]:
    """Return the runs of the recipe at `path`.

    Args:
        path: the recipe's.
        overrides: settings of the recipe.
        verbs: name → module, whose REQUIRED_KEYS are the keys that a recipe must set.
        implied: verb → settings that it adds by itself.
        only: names of stages; none: all.

    Raises:
        UserError: a recipe without anything to rehearse or without what its verb requires, a stage
            that a pipeline would refuse, or a model that no stage has."""
    if "stages" not in pipeline_recipe.read_tree(Path(path)):
        config = configuration.load_recipe(path, dict(overrides))
        verb = infer_verb(config)
        if config.eval.benchmarks and not (config.data.path or config.data.task):
            raise UserError(
                f"recipe {path}: it is for eval, which is rehearsed by itself with --eval.limit 2",
                key="eval.benchmarks",
                cause=Cause.UNSUPPORTED,
            )
        added, required = implied.get(verb, {}), importlib.import_module(verbs[verb]).REQUIRED_KEYS
        config = configuration.load_recipe(path, {**added, **overrides}, required)
        return [RehearsalJob(Path(path).stem, verb, config)]
    recipe = pipeline_recipe.load_pipeline(path, dict(overrides))
    added = {verb: nest_keys(settings) for verb, settings in implied.items()}
    plan = PipelinePlan.from_recipe(
        recipe, path, Path(recipe.pipeline.folder), recipe.pipeline.seed, added
    )
    check_plan(plan, verbs, files=False)
    names = [name for name, stage in plan.stages.items() if stage.config.verb in VERBS]
    for name in only:
        if name not in names:
            suggestion = did_you_mean(name, names, "{}") or f"; there are {', '.join(names)}"
            raise UserError(
                f"rehearsal.stages: no stage that is rehearsed is called {name}{suggestion}",
                key="rehearsal.stages",
                cause=Cause.UNKNOWN,
            )
    if not names:
        raise UserError(
            f"recipe {path}: no stage is one of {', '.join(VERBS)}", key="stages", cause=Cause.EMPTY
        )
    jobs = []
    for name in names:
        if not only or name in only:
            config = plan.config(plan.stages[name])
            config = config.with_changes(model={"path": _model_path(plan, name, config)})
            jobs.append(RehearsalJob(name, plan.stages[name].config.verb, config))
    return jobs


def _model_path(plan: PipelinePlan, name: str, config: Config) -> str:
    """Return the model that the stage, or the stages before it, start from."""
    path = plan.resolve_here(config.model.path)
    if match := REFERENCE_PATTERN.match(path):  # a stage, or a file of its folder
        name_of_earlier = match[1].partition(".")[0]
        earlier = plan.stages.get(name_of_earlier)
        if earlier is not None and earlier.config.verb in VERBS:
            return _model_path(plan, name_of_earlier, plan.config(earlier))
    if Path(path, "config.json").is_file():
        return path
    # A model that is not there yet: the recipe itself names a config.json to plan with.
    stage_recipe = plan.stages[name].config.recipe
    if stage_recipe:
        planned = (
            pipeline_recipe.read_tree(plan.path.parent / stage_recipe)
            .get("model", {})
            .get("path", "")
        )
        if Path(planned, "config.json").is_file():
            return planned
    raise UserError(
        f"rehearse: stage {name} starts from {path}, which has no config.json; give a folder with "
        f"one: --stages.{name}.model.path FOLDER",
        key=f"stages.{name}.model.path",
        cause=Cause.NOT_FOUND,
    )
