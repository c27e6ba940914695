"""Run a recipe in miniature on this machine before it is run on a cluster: the same verb, layout
structure, engines and transport with sizes divided, random weights and synthetic questions. Of a
pipeline, every stage that trains or samples. See docs/rehearse.md."""

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.commands import reward_model
from megatron_r1.commands.training_run import check_trainer
from megatron_r1.config import Config
from megatron_r1.config.overrides import take_section
from megatron_r1.controller.rollouts.players import find_player
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.from_recipe import max_model_len
from megatron_r1.engines.server.recipe_checks import check_engines
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.push.plan.from_recipe import check_pushes
from megatron_r1.rehearse import coverage, launch, miniature, model
from megatron_r1.rehearse.jobs import RehearsalJob, check_connections, jobs
from megatron_r1.rehearse.phases import PhaseRunner
from megatron_r1.rehearse.settings import RehearsalConfig, RehearsalSettings
from megatron_r1.reporting.run_folder import RunFolder

SETTINGS = ("rehearsal",)
SHORT = {"on": "rehearsal.on"}
IMPLIED_SETTINGS = {"reward-model": reward_model.IMPLIED}


def run(path: str, overrides: Mapping[str, Any], verbs: Mapping[str, str]) -> None:
    """Rehearse the recipe at `path`.

    Args:
        path: the recipe's.
        overrides: settings of the recipe, and `rehearsal.` settings.
        verbs: name → module of the verbs that stages may use.

    Raises:
        UserError: the recipe cannot be rehearsed; before anything starts.
        RunError: the first phase that fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are stopped
    own, others = take_section(overrides, RehearsalSettings)
    settings = own.rehearsal
    found = jobs(path, others, verbs, IMPLIED_SETTINGS, settings.stages)
    for job in found:
        _check(job.config, job.verb)
    if settings.on == "gpu" and not gpu.is_usable():
        raise UserError(
            "rehearsal.on: gpu, and there is none here; use null-gpu or cpu",
            key="rehearsal.on",
            cause=Cause.NOT_FOUND,
        )
    if settings.on == "null-gpu" and not launch.is_on_null_gpu():
        small = [_shrink(job, settings, Path()).config for job in found]
        gpus = [
            launch.num_null_gpus(each, job.verb) for each, job in zip(small, found, strict=True)
        ]
        if launch.run_on_null_gpu(sys.argv[1:], max(gpus)):
            raise RunError("rehearse: it has failed on the null GPU, see above")
        return
    same: dict[str, str] = {}
    for job in found:
        first = same.setdefault(_identity(job, settings), job.name)
        if first == job.name:
            _rehearse(job, settings)
        else:
            print(f"{job.name}: in miniature it is {first}, and is not repeated", flush=True)


def _check(config: Config, verb: str) -> None:
    """Raise UserError for what the full-size run would refuse, since its miniature may no longer
    have it."""
    hf = read_hf_config(config.model.path, None)
    if verb in ("rl", "sample"):
        check_engines(config, hf)
        if not launch.is_on_null_gpu():  # there the command that started this one has asked vLLM
            check_arguments(config.rollout, "rollout")
        max_model_len(config)
    if verb != "sample":
        check_trainer(config, verb)
    if verb == "rl":
        find_player(config)
        check_pushes(config, hf, config.parallel.processes)
        check_connections(config, hf)


def _identity(job: RehearsalJob, settings: RehearsalConfig) -> str:
    """Return a text that is equal for runs whose miniatures are."""
    small = _shrink(job, settings, Path())
    return repr((job.verb, small.config, small.hf))


def _shrink(job: RehearsalJob, settings: RehearsalConfig, folder: Path) -> miniature.Miniature:
    hf = read_hf_config(job.config.model.path, None)
    return miniature.make_miniature(job.config, hf, folder, settings.max_ranks, on=settings.on)


def _rehearse(job: RehearsalJob, settings: RehearsalConfig) -> None:
    config = job.config
    folder = Path(settings.folder or f"{config.run.folder}-rehearsal") / job.name
    hf = read_hf_config(config.model.path, None)
    small = _shrink(job, settings, folder)
    with RunFolder(folder) as lock:
        if (folder / "recipe.yaml").exists():
            raise UserError(
                f"rehearsal.folder: {lock.path} has an earlier rehearsal; remove it, or choose "
                "another folder",
                key="rehearsal.folder",
                cause=Cause.EXISTS,
            )
        written = miniature.write(small, job.verb)
        ranks = "no" if job.verb == "sample" else small.config.parallel.processes
        print(f"{job.name}: {job.verb} with {ranks} trainer ranks in {folder}", flush=True)
        rows = coverage.structure_rows(config, hf, small.config, job.verb, on=settings.on)
        with model.serve_reward_models(small.config, small.hf, folder, job.verb) as addresses:
            run = (job.verb, written, small.config, addresses)
            shown = PhaseRunner(*run, settings.timeout_seconds, _announce).run()
        coverage.write(folder, job.name, rows, shown, small.changes)


def _announce(phase: str) -> None:
    print(f"  {phase} …", flush=True)
