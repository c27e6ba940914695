"""Runs commands as a graph of stages: those not done, unless some are stale, with one report. See
docs/pipeline.md."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import access
from megatron_r1.commands.parts.torchrun import is_rank
from megatron_r1.commands.verb_module import load_verb
from megatron_r1.config.yaml_text import format_value, nest_keys
from megatron_r1.pipeline import manifest, serving
from megatron_r1.pipeline.executor import Executor
from megatron_r1.pipeline.graph import StageGraph, check_plan, missing_files, unknown_stage
from megatron_r1.pipeline.pipeline_recipe import PipelineConfig, PipelineRecipe, load_pipeline
from megatron_r1.pipeline.pipeline_report import write_pipeline_report
from megatron_r1.pipeline.stage_runner import StopSignals, write_recipe
from megatron_r1.pipeline.stages import PipelinePlan
from megatron_r1.pipeline.status import StageState, all_statuses, stale_text, status_lines
from megatron_r1.reporting.folder_lock import is_locked
from megatron_r1.reporting.run_folder import RunFolder

RECIPE = PipelineRecipe


def run(path: str, overrides: Mapping[str, Any], verbs: Mapping[str, str]) -> None:
    """Run the pipeline of the recipe at `path`.

    Args:
        path: the recipe.
        overrides: settings of the command line.
        verbs: name → module of the verbs that stages may use.

    Raises:
        UserError: before anything runs.
        RunError: a stage fails.
        KeyboardInterrupt: the pipeline is asked to stop."""
    if is_rank():
        raise UserError(
            "pipeline is one process and starts the others: give a stage the launch "
            '"torchrun --no-python …", and run pipeline itself without torchrun',
            key="torchrun",
            cause=Cause.CONFLICT,
        )
    recipe = load_pipeline(path, dict(overrides))
    config, root = recipe.pipeline, Path(recipe.pipeline.folder)
    access.allow_readers(config.readable_by)
    seeds = config.seeds or [config.seed]
    folders = [root / f"seed_{seed}" if config.seeds else root for seed in seeds]
    implied_settings = _implied_settings(verbs, {stage.verb for stage in recipe.stages.values()})
    plans = [
        PipelinePlan.from_recipe(recipe, path, folder, seed, implied_settings)
        for folder, seed in zip(folders, seeds, strict=True)
    ]
    for plan in plans:
        check_plan(plan, verbs, files=not (config.status or config.dry))
    graph = StageGraph(plans[0].stages)
    stage_names = _stages_to_run(config, graph)
    if config.status:
        is_running = is_locked(root)
        for plan in plans:
            print(f"{plan.folder} · seed {plan.seed}")
            statuses = all_statuses(plan, graph, is_running)
            print("\n".join(status_lines(plan, stage_names, statuses)), flush=True)
        return
    if config.dry:
        with RunFolder(root):  # a pipeline at work, and its jobs in a queue, read these recipes
            _print_commands(plans, graph, stage_names)
        for _, line in missing_files(plans[0]):
            print(f"missing yet: {line}", file=sys.stderr)
        return
    with RunFolder(root):
        for plan in plans:
            _check_states(config, plan, graph, stage_names)
        try:
            with StopSignals() as signals:
                Executor(config, plans, graph, signals).run(stage_names)
        finally:
            command = ["megatron-r1", "pipeline", path]
            command += [f"--{key}={format_value(value)}" for key, value in overrides.items()]
            report = write_pipeline_report(root, config.title, shlex.join(command), plans, graph)
            print(f"{report}; report.md and report.json next to it", flush=True)


def _implied_settings(verbs: Mapping[str, str], used_verbs: set[str]) -> dict[str, dict[str, Any]]:
    """Return the settings that each verb in use adds to a recipe, as sections."""
    known_verbs = used_verbs & set(verbs)
    return {verb: nest_keys(load_verb(verb, verbs[verb]).implied_settings) for verb in known_verbs}


def _stages_to_run(config: PipelineConfig, graph: StageGraph) -> list[str]:
    """Return the stages to run, in order.

    Raises:
        UserError: an unknown name.
    """
    for key, name in (("only", config.only), ("until", config.until)):
        if name and name not in graph.upstream:
            raise UserError(
                f"pipeline.{key}: {unknown_stage(name, graph.order)}",
                key=f"pipeline.{key}",
                cause=Cause.UNKNOWN,
            )
    if config.only:
        return [config.only]
    if config.until:
        return graph.sorted(graph.needs(config.until) | {config.until})
    return graph.order


def _check_states(
    config: PipelineConfig, plan: PipelinePlan, graph: StageGraph, stage_names: list[str]
) -> None:
    """Raise UserError for stale stages without `pipeline.rerun`, and for `pipeline.only` with a
    stage that needs others first."""
    statuses = all_statuses(plan, graph)
    if config.only:
        unfinished = [
            f"{name} is {statuses[name].state}"
            for name in graph.upstream[config.only]
            if statuses[name].state is not StageState.DONE
        ]
        if unfinished:
            raise UserError(
                f"pipeline.only: {config.only} needs what is not done: {', '.join(unfinished)}; "
                f"--pipeline.until {config.only} runs that, too",
                key="pipeline.only",
                cause=Cause.MISSING,
            )
    stale_stages = {
        name: statuses[name] for name in stage_names if statuses[name].state is StageState.STALE
    }
    if stale_stages and not config.rerun:
        raise UserError(stale_text(plan, stale_stages), key="pipeline.rerun", cause=Cause.CHANGED)


def _print_commands(plans: list[PipelinePlan], graph: StageGraph, stage_names: list[str]) -> None:
    """Print what would run, as shell commands, and write the recipes that they name. A stage that
    has begun keeps the ports of its served models."""
    for plan in plans:
        for name in stage_names:
            stage = plan.stages[name]
            configs = {n: plan.server(server) for n, server in stage.config.serve.items()}
            begun_stage = manifest.read_record(plan.folder_of(name), manifest.BEGUN_FILE) or {}
            begun_ports = begun_stage.get("ports", {})
            new_servers = {n: server for n, server in configs.items() if n not in begun_ports}
            ports = {**begun_ports, **serving.choose_ports(new_servers, {})}
            urls = {n: serving.server_url(server, ports[n]) for n, server in configs.items()}
            upstream = ", ".join(graph.upstream[name])
            print(f"# {name}{f', after {upstream}' if upstream else ''}")
            for server_name, server in configs.items():
                command = serving.server_command(server_name, server, ports[server_name])
                print(shlex.join([*shlex.split(server.launch), *command]), "&")
            launch = shlex.split(plan.resolve(stage.config.launch, urls))
            print(shlex.join([*launch, *write_recipe(plan, stage, urls)]), flush=True)
