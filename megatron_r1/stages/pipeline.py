"""R1's stages as a graph: run what is not done, say what is stale, report on all."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.pipeline import record, serving
from megatron_r1.pipeline.check import check, missing_files
from megatron_r1.pipeline.figures import figures_of, headline
from megatron_r1.pipeline.graph import Graph
from megatron_r1.pipeline.locks import is_locked
from megatron_r1.pipeline.plan import Plan
from megatron_r1.pipeline.recipe import PipelineConfig, load
from megatron_r1.pipeline.report import write_report
from megatron_r1.pipeline.runner import Runner, Signals, StageFailed, write_recipe
from megatron_r1.pipeline.schedule import run_all
from megatron_r1.pipeline.state import State, Status, examine, examine_all
from megatron_r1.pipeline.status import reasons, status_lines
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.wording import duration
from megatron_r1.suggestion import did_you_mean


def run(path: str, overrides: Mapping[str, Any], verbs: Mapping[str, str]) -> None:
    """verbs: name → module, of what stages may run. Raises ValueError before anything runs,
    RuntimeError when a stage fails, KeyboardInterrupt when it was asked to stop."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ValueError(
            "pipeline is one process and starts the others: give a stage the launch "
            '"torchrun --no-python …", and run pipeline itself without torchrun'
        )
    recipe = load(path, dict(overrides))
    config, root = recipe.pipeline, Path(recipe.pipeline.folder)
    seeds = config.seeds or [config.seed]
    folders = [root / f"seed_{seed}" if config.seeds else root for seed in seeds]
    implied = _implied(verbs, {stage.verb for stage in recipe.stages.values()})
    plans = [
        Plan.of(recipe, path, folder, seed, implied)
        for folder, seed in zip(folders, seeds, strict=True)
    ]
    for plan in plans:
        check(plan, verbs, files=not (config.status or config.dry))
    graph = Graph(plans[0].stages)
    chosen = _chosen(config, graph)
    if config.status:
        _print_status(plans, graph, chosen, is_locked(root))
        return
    if config.dry:
        _print_commands(plans, graph, chosen)
        for line in missing_files(plans[0]):
            print(f"missing yet: {line}", file=sys.stderr)
        return
    with RunFolder(root):
        for plan in plans:
            _refuse(config, plan, graph, chosen)
        try:
            with Signals() as signals:
                _run_plans(config, plans, graph, chosen, signals)
        finally:
            command = ["megatron-r1", "pipeline", path]
            command += [f"--{key}={_as_typed(value)}" for key, value in overrides.items()]
            report = write_report(root, config.title, shlex.join(command), plans, graph)
            print(f"{report}; report.md and report.json beside it", flush=True)


def _run_plans(
    config: PipelineConfig, plans: list[Plan], graph: Graph, chosen: list[str], signals: Signals
) -> None:
    """Every chosen stage of every seed that is not done."""
    found = {plan.seed: examine_all(plan, graph) for plan in plans}
    for plan in plans:
        print(f"{plan.folder} · {len(chosen)} stages · seed {plan.seed}")
        print("\n".join(status_lines(plan, chosen, found[plan.seed])), flush=True)
    of_seed = {plan.seed: plan for plan in plans}

    def name_of(task: tuple[int, str]) -> str:
        seed, name = task
        return f"{of_seed[seed].folder.name}/{name}" if config.seeds else name

    def needs(task: tuple[int, str]) -> list[tuple[int, str]]:
        seed, name = task
        return [(seed, upper) for upper in graph.upstream[name]]

    def work(task: tuple[int, str]) -> None:
        signals.raise_if_asked()
        seed, name = task
        prefix = f"{name_of(task)}: " if config.jobs > 1 else ""
        runner = Runner(of_seed[seed], signals, _say, prefix)
        _run_stage(config, runner, graph, found[seed], name, name_of(task))

    def failed(error: Exception, others: list[tuple[int, str]]) -> None:
        waiting = ", ".join(name_of(other) for other in others)
        going_on = f"\nno other stage begins; still running: {waiting} (Ctrl-C stops that)"
        _say(f"{error}{going_on if others else ''}")

    tasks = [(plan.seed, name) for plan in plans for name in chosen]
    run_all(tasks, needs, work, config.jobs, failed)


def _run_stage(
    config: PipelineConfig,
    runner: Runner,
    graph: Graph,
    statuses: dict[str, Status],
    name: str,
    called: str,
) -> None:
    """Bring one stage to its end and its status up to date, those above it being done."""
    plan = runner.plan
    stage, upstream = plan.stages[name], graph.upstream[name]
    # What stands above it may have been done again, and may have come out the same.
    above = {upper: statuses[upper] for upper in upstream}
    statuses[name] = examine(plan, stage, above)
    if statuses[name].state is State.DONE:
        return
    if statuses[name].state is State.STALE:
        if not config.rerun:
            raise ValueError(_stale(plan, {name: statuses[name]}))
        _say(f"{called}: what it was is now in {move_aside(plan.folder_of(name))}")
    goes_on = record.read(plan.folder_of(name), record.BEGUN) is not None
    begins = "continues" if goes_on else "begins"
    _say(f"{called} ({stage.config.verb}) {begins}; log {plan.log_of(name)}")
    try:
        runner.run(stage, upstream, _wanted(plan, name))
    except StageFailed as failure:
        raise RuntimeError(
            f"stage {called} failed: {failure}\nThe same command continues with this stage."
        ) from None
    statuses[name] = examine(plan, stage, above)
    told = headline(figures_of(plan.folder_of(name)))
    took = duration(statuses[name].seconds or 0.0)
    _say(f"{called} is {statuses[name].state} after {took}{f': {told}' if told else ''}")


def _as_typed(value: Any) -> str:
    """A setting as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def move_aside(folder: Path) -> Path:
    """Rename a stage's folder to the first of `STAGE.old-1`, `.old-2`, … that is free."""
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(old)


def _implied(verbs: Mapping[str, str], used: set[str]) -> dict[str, dict[str, Any]]:
    """What each verb in use says beside a recipe, as sections."""
    found: dict[str, dict[str, Any]] = {}
    for verb in used & set(verbs):
        module = importlib.import_module(verbs[verb])
        for dotted, value in getattr(module, "IMPLIED", {}).items():
            section, _, key = dotted.partition(".")
            found.setdefault(verb, {}).setdefault(section, {})[key] = value
    return found


def _chosen(config: PipelineConfig, graph: Graph) -> list[str]:
    """The stages to run, in order. Raises ValueError for a name that is no stage's."""
    for key, name in (("only", config.only), ("until", config.until)):
        if name and name not in graph.upstream:
            near = did_you_mean(name, graph.order, "{}") or f"; there are {', '.join(graph.order)}"
            raise ValueError(f"pipeline.{key}: no stage is called {name}{near}")
    if config.only:
        return [config.only]
    if config.until:
        return graph.sorted(graph.needs(config.until) | {config.until})
    return graph.order


def _refuse(config: PipelineConfig, plan: Plan, graph: Graph, chosen: list[str]) -> None:
    """Raises ValueError for stale stages that may not be redone, and for `only` too early."""
    statuses = examine_all(plan, graph)
    if config.only:
        not_done = [
            f"{name} is {statuses[name].state}"
            for name in graph.upstream[config.only]
            if statuses[name].state is not State.DONE
        ]
        if not_done:
            raise ValueError(
                f"pipeline.only: {config.only} needs what is not done: {', '.join(not_done)}; "
                f"--pipeline.until {config.only} runs that, too"
            )
    stale = {name: statuses[name] for name in chosen if statuses[name].state is State.STALE}
    if stale and not config.rerun:
        raise ValueError(_stale(plan, stale))


def _stale(plan: Plan, stale: Mapping[str, Status]) -> str:
    lines = [f"{plan.folder}: made of something else than they would be now:"]
    for name, status in stale.items():
        lines += [f"  {name}: {reason}" for reason in reasons(status)]
    lines.append(
        "--pipeline.rerun true moves them aside, to STAGE.old-N, and does them again; or put back "
        "what they were made of: settings from the command line are to be given every time."
    )
    return "\n".join(lines)


def _wanted(plan: Plan, name: str) -> set[str]:
    """What other stages refer to in this one's folder."""
    found = {ref for stage in plan.stages.values() for _, ref in stage.references}
    return {ref.partition(".")[2] for ref in found if ref.startswith(f"{name}.")}


def _print_status(plans: list[Plan], graph: Graph, chosen: list[str], is_running: bool) -> None:
    for plan in plans:
        print(f"{plan.folder} · seed {plan.seed}")
        statuses = examine_all(plan, graph, is_running)
        print("\n".join(status_lines(plan, chosen, statuses)), flush=True)


def _print_commands(plans: list[Plan], graph: Graph, chosen: list[str]) -> None:
    """What would run, as lines of a shell; the recipes they name are written."""
    for plan in plans:
        for name in chosen:
            stage = plan.stages[name]
            configs = {n: plan.server(server) for n, server in stage.config.serve.items()}
            ports = serving.choose_ports(configs, {})
            urls = {n: serving.url(server, ports[n]) for n, server in configs.items()}
            needed = ", ".join(graph.upstream[name])
            print(f"# {name}{f', after {needed}' if needed else ''}")
            for served, server in configs.items():
                command = serving.server_command(served, server, ports[served])
                print(shlex.join([*shlex.split(server.launch), *command]), "&")
            launch = shlex.split(plan.resolve(stage.config.launch, urls))
            print(shlex.join([*launch, *write_recipe(plan, stage, urls)]), flush=True)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
