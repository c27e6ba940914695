"""Checks of a plan before anything runs."""

import ast
import importlib
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.user_code import source_of
from megatron_r1.data.records import HUB
from megatron_r1.pipeline.graph import Graph, all_of
from megatron_r1.pipeline.pipeline_recipe import MAKE
from megatron_r1.pipeline.plan import PipelinePlan, PipelineStage, names_a_file
from megatron_r1.pipeline.references import REFERENCE, texts


def check(plan: PipelinePlan, verbs: Mapping[str, str], files: bool = True) -> None:
    """Raise UserError with a line for every stage that cannot run.

    verbs: name → module, whose REQUIRED are the keys that a recipe must set. files: whether files
    named in settings must exist."""
    mistakes = list(plan.broken.values())
    for name, stage in plan.stages.items():
        if name not in plan.broken:
            mistakes += _mistakes_of(f"stages.{name}", _check_stage, plan, stage, verbs)
    mistakes += _mistakes_of("stages", Graph, plan.stages)
    if files:
        mistakes += [
            UserError(line, key=key, cause=Cause.NOT_FOUND) for key, line in missing_files(plan)
        ]
    if mistakes:
        raise all_of(mistakes)


def _mistakes_of(place: str, check: Callable[..., Any], *arguments: Any) -> list[UserError]:
    """Return the error that `check` raises for a stage at `place`, [] if it raises none."""
    try:
        check(*arguments)
    except UserError as error:
        if not error.key.startswith("stages"):
            error.key = f"{place}.{error.key}"
        return [error]
    except ValueError as error:
        return [UserError(str(error), key=place, cause=Cause.MALFORMED)]
    return []


def missing_files(plan: PipelinePlan) -> list[tuple[str, str]]:
    """Return (key, reason) of every setting that names a missing file or folder which no stage
    makes."""
    named = []
    for stage in plan.stages.values():
        for name, server in stage.config.serve.items():
            named.append((stage.name, f"serve.{name}.model", server.model))
        for place, text in texts({} if stage.is_function else stage.settings):
            if names_a_file(place) and not text.startswith(HUB):
                named.append((stage.name, place, text))
    located = [(name, place, plan.located(text)) for name, place, text in named]
    return [
        (
            f"stages.{name}.{place}",
            f"{plan.path}: stages.{name}: {place}: {path}: no such file or folder (relative to "
            f"{Path.cwd()})",
        )
        for name, place, path in located
        if path and not REFERENCE.search(path) and not Path(path).exists()
    ]


def _check_stage(plan: PipelinePlan, stage: PipelineStage, verbs: Mapping[str, str]) -> None:
    config, where = stage.config, f"{plan.path}: stages.{stage.name}"
    if stage.is_function:
        _check_function(where, config.function, config.arguments)
    elif config.verb in verbs:
        command = importlib.import_module(verbs[config.verb])
        settings = plan.config(stage, command.REQUIRED)
        if check := getattr(command, "check", None):
            check(settings)
    else:
        known = [MAKE, *verbs]
        near = did_you_mean(config.verb, known, "{}") or f"; there are {', '.join(known)}"
        message = f"{where}: unknown verb {config.verb}{near}"
        raise UserError(message, key="verb", cause=Cause.UNKNOWN)
    for text in (config.launch, *(server.launch for server in config.serve.values())):
        try:
            shlex.split(text)
        except ValueError as error:
            message = f"{where}: launch: {text!r}: {error}"
            raise UserError(message, key="launch", cause=Cause.MALFORMED) from None


def _check_function(where: str, function: str, arguments: Mapping[str, Any]) -> None:
    name = function.partition(":")[2]
    try:
        tree = ast.parse(source_of(function))
    except UserError as error:
        raise UserError(f"{where}: {error}", key="function", cause=error.cause) from None
    except (ValueError, SyntaxError) as error:
        message = f"{where}: {error}"
        raise UserError(message, key="function", cause=Cause.MALFORMED) from None
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in defined:
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        if {name, "*"} & {alias.asname or alias.name for node in imports for alias in node.names}:
            return  # its arguments stand in another module, and are checked by the call
        near = did_you_mean(name, defined, "{}") or f"; it has {', '.join(defined) or 'none'}"
        message = f"{where}: function {function}: the module has no function {name}{near}"
        raise UserError(message, key="function", cause=Cause.NOT_FOUND)
    # The first parameter is the folder; the others are passed by name.
    parameters, where = defined[name].args, f"{where}: arguments of {function}"
    positional = [p.arg for p in (*parameters.posonlyargs, *parameters.args)][1:]
    names = positional + [p.arg for p in parameters.kwonlyargs]
    for name in arguments:
        if name not in names and parameters.kwarg is None:
            near = did_you_mean(name, names, "{}") or f"; it takes {', '.join(names) or 'none'}"
            message = f"{where}: unknown argument {name}{near}"
            raise UserError(message, key=f"arguments.{name}", cause=Cause.UNKNOWN)
    num_needed = len(positional) - len(parameters.defaults)
    needed = positional[: max(0, num_needed)]
    defaults = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    needed += [p.arg for p, default in defaults if default is None]
    missing = [name for name in needed if name not in arguments]
    if missing:
        message = f"{where}: {', '.join(missing)} must be given"
        raise UserError(message, key=f"arguments.{missing[0]}", cause=Cause.MISSING)
