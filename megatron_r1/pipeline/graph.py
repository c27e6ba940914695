"""The graph of stages: references are its edges, `after` adds edges without a file. A plan is
checked with it before anything runs."""

import ast
import importlib
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.user_code import module_source
from megatron_r1.data.dataset_files import HUB
from megatron_r1.pipeline.pipeline_recipe import MAKE
from megatron_r1.pipeline.references import REFERENCE_PATTERN, iter_texts
from megatron_r1.pipeline.stages import PipelinePlan, PipelineStage, names_a_file

TRAINING_OUTPUTS = ("hf", "checkpoints", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
ADAPTER = "adapter"
"""What a verb that trains leaves besides, with model.lora."""
OUTPUTS = {
    "sft": TRAINING_OUTPUTS,
    "rl": TRAINING_OUTPUTS,
    "reward-model": TRAINING_OUTPUTS,
    "eval": ("eval.json", "samples.jsonl", "questions.jsonl"),
    "sample": ("sft.jsonl", "pairs.jsonl", "labels.jsonl", "samples.jsonl", "sample.json"),
}
"""The outputs of each verb. Outputs of a function are checked after it ran."""
REFERENCE_VALUES = {"pipeline": ("folder", "seed"), "here": ("",)}


def _join_mistakes(mistakes: Sequence[UserError]) -> UserError:
    """Return the error that has the lines of all; key and cause are those of the first."""
    lines = "\n".join(map(str, mistakes))
    return UserError(lines, key=mistakes[0].key, cause=mistakes[0].cause)


class StageGraph:
    """The stages of a pipeline and the stages that each of them needs.

    order and `sorted` keep the recipe's order where the edges allow it.

    Attributes:
        upstream: stage → the stages that it needs directly.
        order: all stages, each after its upstream."""

    def __init__(self, stages: Mapping[str, PipelineStage]) -> None:
        """Read the edges.

        Raises:
            UserError: a reference is unknown, with a line for every such stage; or the references
                have a cycle.
        """
        self.upstream: dict[str, tuple[str, ...]] = {}
        mistakes: list[UserError] = []
        for name, stage in stages.items():
            try:
                self.upstream[name] = _upstream_stages(stage, stages)
            except UserError as error:
                mistakes.append(error)
        if mistakes:
            raise _join_mistakes(mistakes)
        self.order = _sort_stages(self.upstream)

    def needs(self, stage: str) -> set[str]:
        """Return all stages that must be done before `stage`."""
        direct_stages = self.upstream[stage]
        return set(direct_stages).union(*map(self.needs, direct_stages))

    def sorted(self, stages: Collection[str]) -> list[str]:
        """Return the stages in an order in which each comes after those it needs."""
        return [name for name in self.order if name in stages]

    def depths(self) -> dict[str, int]:
        """Return the longest path to each stage, 0 for one that needs nothing."""
        depths: dict[str, int] = {}
        for name in self.order:
            depths[name] = 1 + max((depths[parent] for parent in self.upstream[name]), default=-1)
        return depths


def _upstream_stages(stage: PipelineStage, stages: Mapping[str, PipelineStage]) -> tuple[str, ...]:
    """Return the stages that `stage` needs directly, in the order of its references."""
    upstream: dict[str, None] = {}
    for key_path, reference in stage.references:
        head, _, value_name = reference.partition(".")
        key = f"stages.{stage.name}.{key_path}"
        source = f"stages.{stage.name}: {key_path}: ${{{reference}}}"
        if head in REFERENCE_VALUES:
            if value_name not in REFERENCE_VALUES[head]:
                names = ", ".join(
                    ".".join(filter(None, (head, name))) for name in REFERENCE_VALUES[head]
                )
                raise UserError(
                    f"{source} is unknown; there is {names}",
                    key=key,
                    cause=Cause.UNKNOWN,
                )
        elif head == "serve":
            _check_served(stage, key, source, value_name)
        else:
            _check_output(stages, key, source, head, value_name)
            upstream[head] = None
    for name in stage.config.after:
        if name not in stages:
            raise UserError(
                f"stages.{stage.name}: after: {unknown_stage(name, stages)}",
                key=f"stages.{stage.name}.after",
                cause=Cause.UNKNOWN,
            )
        upstream[name] = None
    if stage.config.evaluates and stage.config.evaluates not in stages:
        unknown_message = unknown_stage(stage.config.evaluates, stages)
        raise UserError(
            f"stages.{stage.name}: evaluates: {unknown_message}",
            key=f"stages.{stage.name}.evaluates",
            cause=Cause.UNKNOWN,
        )
    return tuple(upstream)


def _check_served(stage: PipelineStage, key: str, source: str, served_name: str) -> None:
    name, dot, field = served_name.rpartition(".")
    if not dot or field != "url":
        message = f"{source} is unknown; there is ${{serve.NAME.url}}"
        raise UserError(message, key=key, cause=Cause.UNKNOWN)
    if name not in stage.config.serve:
        suggestion = did_you_mean(name, stage.config.serve, "{}")
        suggestion = suggestion or f"; it serves {', '.join(stage.config.serve) or 'nothing'}"
        message = f"{source}: {name} is not in its serve{suggestion}"
        raise UserError(message, key=key, cause=Cause.UNKNOWN)


def _check_output(
    stages: Mapping[str, PipelineStage], key: str, source: str, head: str, output: str
) -> None:
    if head not in stages:
        message = f"{source}: {unknown_stage(head, stages)}"
        raise UserError(message, key=key, cause=Cause.UNKNOWN)
    outputs = OUTPUTS.get(stages[head].config.verb)
    model = stages[head].settings.get("model")
    if outputs is TRAINING_OUTPUTS and isinstance(model, Mapping) and model.get("lora") is not None:
        outputs = (*outputs, ADAPTER)
    if output and outputs and output.partition("/")[0] not in outputs:
        suggestion = did_you_mean(output, outputs, "{}") or f"; it has {', '.join(outputs)}"
        message = f"{source}: {stages[head].config.verb} leaves no {output}{suggestion}"
        raise UserError(message, key=key, cause=Cause.UNKNOWN)


def unknown_stage(name: str, stages: Collection[str]) -> str:
    """Return that there is no such stage, with the nearest, or all there are."""
    suggestion = did_you_mean(name, stages, "{}") or f"; there are {', '.join(stages)}"
    return f"no stage is called {name}{suggestion}"


def _sort_stages(upstream: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Sort topologically; of stages that could be next, the first in the recipe is."""
    sorter = TopologicalSorter(upstream)
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(
            f"stages need each other: {' → '.join(error.args[1])}",
            key="stages",
            cause=Cause.CONFLICT,
        ) from None
    order: list[str] = []
    ready_stages: list[str] = []
    while sorter.is_active():
        ready_stages = sorted([*ready_stages, *sorter.get_ready()], key=list(upstream).index)
        order.append(ready_stages.pop(0))
        sorter.done(order[-1])
    return order


def check_plan(plan: PipelinePlan, verbs: Mapping[str, str], files: bool = True) -> None:
    """Raise UserError with a line for every stage that cannot run.

    Args:
        plan: the pipeline.
        verbs: name → module, whose REQUIRED_KEYS are the keys that a recipe must set.
        files: whether files named in settings must exist."""
    mistakes = list(plan.stage_errors.values())
    for name, stage in plan.stages.items():
        if name not in plan.stage_errors:
            mistakes += _catch_mistake(f"stages.{name}", _check_stage, plan, stage, verbs)
    mistakes += _catch_mistake("stages", StageGraph, plan.stages)
    if files:
        mistakes += [
            UserError(line, key=key, cause=Cause.NOT_FOUND) for key, line in missing_files(plan)
        ]
    if mistakes:
        raise _join_mistakes(mistakes)


def _catch_mistake(key_path: str, check: Callable[..., Any], *arguments: Any) -> list[UserError]:
    """Return the error that `check` raises for a stage at `key_path`, [] if it raises none."""
    try:
        check(*arguments)
    except UserError as error:
        if not error.key.startswith("stages"):
            error.key = f"{key_path}.{error.key}"
        return [error]
    except ValueError as error:
        return [UserError(str(error), key=key_path, cause=Cause.MALFORMED)]
    return []


def missing_files(plan: PipelinePlan) -> list[tuple[str, str]]:
    """Return (key, reason) of every setting that names a missing file or folder which no stage
    makes."""
    file_settings = []
    for stage in plan.stages.values():
        for name, server in stage.config.serve.items():
            file_settings.append((stage.name, f"serve.{name}.model", server.model))
        for key_path, text in iter_texts({} if stage.is_function else stage.settings):
            if names_a_file(key_path) and not text.startswith(HUB):
                file_settings.append((stage.name, key_path, text))
    located_files = [
        (name, key_path, plan.resolve_here(text)) for name, key_path, text in file_settings
    ]
    return [
        (
            f"stages.{name}.{key_path}",
            f"{plan.path}: stages.{name}: {key_path}: {path}: no such file or folder (relative to "
            f"{Path.cwd()})",
        )
        for name, key_path, path in located_files
        if path and not REFERENCE_PATTERN.search(path) and not Path(path).exists()
    ]


def _check_stage(plan: PipelinePlan, stage: PipelineStage, verbs: Mapping[str, str]) -> None:
    config, source = stage.config, f"{plan.path}: stages.{stage.name}"
    if stage.is_function:
        _check_function(source, config.function, config.arguments)
    elif config.verb in verbs:
        command = importlib.import_module(verbs[config.verb])
        settings = plan.config(stage, command.REQUIRED_KEYS)
        if check := getattr(command, "check", None):
            check(settings)
    else:
        verb_names = [MAKE, *verbs]
        suggestion = (
            did_you_mean(config.verb, verb_names, "{}") or f"; there are {', '.join(verb_names)}"
        )
        message = f"{source}: unknown verb {config.verb}{suggestion}"
        raise UserError(message, key="verb", cause=Cause.UNKNOWN)
    for text in (config.launch, *(server.launch for server in config.serve.values())):
        try:
            shlex.split(text)
        except ValueError as error:
            message = f"{source}: launch: {text!r}: {error}"
            raise UserError(message, key="launch", cause=Cause.MALFORMED) from None


def _check_function(source: str, function: str, arguments: Mapping[str, Any]) -> None:
    name = function.partition(":")[2]
    try:
        tree = ast.parse(module_source(function))
    except UserError as error:
        raise UserError(f"{source}: {error}", key="function", cause=error.cause) from None
    except (ValueError, SyntaxError) as error:
        message = f"{source}: {error}"
        raise UserError(message, key="function", cause=Cause.MALFORMED) from None
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in definitions:
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        if {name, "*"} & {alias.asname or alias.name for node in imports for alias in node.names}:
            return  # its arguments stand in another module, and are checked by the call
        suggestion = (
            did_you_mean(name, definitions, "{}") or f"; it has {', '.join(definitions) or 'none'}"
        )
        message = f"{source}: function {function}: the module has no function {name}{suggestion}"
        raise UserError(message, key="function", cause=Cause.NOT_FOUND)
    # The first parameter is the folder; the others are passed by name.
    parameters, source = definitions[name].args, f"{source}: arguments of {function}"
    positional = [p.arg for p in (*parameters.posonlyargs, *parameters.args)][1:]
    names = positional + [p.arg for p in parameters.kwonlyargs]
    for name in arguments:
        if name not in names and parameters.kwarg is None:
            suggestion = (
                did_you_mean(name, names, "{}") or f"; it takes {', '.join(names) or 'none'}"
            )
            message = f"{source}: unknown argument {name}{suggestion}"
            raise UserError(message, key=f"arguments.{name}", cause=Cause.UNKNOWN)
    num_needed = len(positional) - len(parameters.defaults)
    required_names = positional[: max(0, num_needed)]
    defaults = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    required_names += [p.arg for p, default in defaults if default is None]
    missing_names = [name for name in required_names if name not in arguments]
    if missing_names:
        message = f"{source}: {', '.join(missing_names)} must be given"
        raise UserError(message, key=f"arguments.{missing_names[0]}", cause=Cause.MISSING)
