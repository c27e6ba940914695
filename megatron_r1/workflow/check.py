"""Checks of a plan before anything runs."""

import ast
import importlib
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.data.records import HUB
from megatron_r1.errors import UserError, did_you_mean
from megatron_r1.user_code import source_of
from megatron_r1.workflow.graph import Graph
from megatron_r1.workflow.pipeline_recipe import MAKE
from megatron_r1.workflow.plan import WorkflowPlan, WorkflowStage, names_a_file
from megatron_r1.workflow.references import REFERENCE, texts


def check(plan: WorkflowPlan, verbs: Mapping[str, str], files: bool = True) -> None:
    """Raise UserError with a line for every stage that cannot run.

    verbs: name → module, whose REQUIRED are the keys that a recipe must set. files: whether files
    named in settings must exist."""
    mistakes = list(plan.broken.values())
    for name, stage in plan.stages.items():
        if name not in plan.broken:
            mistakes += mistakes_of(_check_stage, plan, stage, verbs)
    mistakes += mistakes_of(Graph, plan.stages)
    if files:
        mistakes += missing_files(plan)
    if mistakes:
        raise UserError("\n".join(mistakes))


def mistakes_of(check: Callable[..., Any], *arguments: Any) -> list[str]:
    """Return the lines of the ValueError that `check` raises, [] if it raises none."""
    try:
        check(*arguments)
    except ValueError as error:
        return str(error).splitlines()
    return []


def missing_files(plan: WorkflowPlan) -> list[str]:
    """Return a line for every missing file or folder that settings name and no stage makes."""
    named = []
    for stage in plan.stages.values():
        where = f"{plan.path}: stages.{stage.name}"
        for name, server in stage.config.serve.items():
            named.append((f"{where}: serve.{name}.model", server.model))
        for place, text in texts({} if stage.is_function else stage.settings):
            if names_a_file(place) and not text.startswith(HUB):
                named.append((f"{where}: {place}", text))
    return [
        f"{place}: {path}: no such file or folder (relative to {Path.cwd()})"
        for place, path in ((place, plan.located(text)) for place, text in named)
        if path and not REFERENCE.search(path) and not Path(path).exists()
    ]


def _check_stage(plan: WorkflowPlan, stage: WorkflowStage, verbs: Mapping[str, str]) -> None:
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
        raise UserError(f"{where}: unknown verb {config.verb}{near}")
    for text in (config.launch, *(server.launch for server in config.serve.values())):
        try:
            shlex.split(text)
        except ValueError as error:
            raise UserError(f"{where}: launch: {text!r}: {error}") from None


def _check_function(where: str, function: str, arguments: Mapping[str, Any]) -> None:
    name = function.partition(":")[2]
    try:
        tree = ast.parse(source_of(function))
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{where}: {error}") from None
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in defined:
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        if {name, "*"} & {alias.asname or alias.name for node in imports for alias in node.names}:
            return  # its arguments stand in another module, and are checked by the call
        near = did_you_mean(name, defined, "{}") or f"; it has {', '.join(defined) or 'none'}"
        raise UserError(f"{where}: function {function}: the module has no function {name}{near}")
    # The first parameter is the folder; the others are passed by name.
    parameters, where = defined[name].args, f"{where}: arguments of {function}"
    positional = [p.arg for p in (*parameters.posonlyargs, *parameters.args)][1:]
    names = positional + [p.arg for p in parameters.kwonlyargs]
    for name in arguments:
        if name not in names and parameters.kwarg is None:
            near = did_you_mean(name, names, "{}") or f"; it takes {', '.join(names) or 'none'}"
            raise UserError(f"{where}: unknown argument {name}{near}")
    num_needed = len(positional) - len(parameters.defaults)
    needed = positional[: max(0, num_needed)]
    defaults = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    needed += [p.arg for p, default in defaults if default is None]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} must be given")
