"""Run a recipe in miniature on this machine before it is run on a cluster. Verb, layout structure,
engines and transport are the same, sizes are divided, weights random, questions synthetic. Of a
pipeline, every stage that trains or samples. See docs/rehearse.md."""

import signal
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.commands import reward_model
from megatron_r1.commands.rehearsal_checks import check_full_size
from megatron_r1.commands.rehearsal_jobs import RehearsalJob, rehearsal_jobs
from megatron_r1.config.overrides import take_section
from megatron_r1.engines.server import gpu
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.rehearse import coverage, miniature, null_gpu, served_reward_models
from megatron_r1.rehearse.phases import PhaseRunner
from megatron_r1.rehearse.settings import RehearsalConfig, RehearsalRecipe
from megatron_r1.reporting.run_folder import RunFolder

SETTINGS = ("rehearsal",)
SHORT_OPTIONS = {"on": "rehearsal.on"}
IMPLIED_BY_VERB = {"reward-model": reward_model.IMPLIED_SETTINGS}


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
    rehearsal_settings, recipe_overrides = take_section(overrides, RehearsalRecipe)
    settings = rehearsal_settings.rehearsal
    jobs = rehearsal_jobs(path, recipe_overrides, verbs, IMPLIED_BY_VERB, settings.stages)
    for job in jobs:
        check_full_size(job.config, job.verb)
    if any(job.verb in ("rl", "sample") for job in jobs) and not find_spec("vllm"):
        raise UserError(
            f"vllm, whose engines the rehearsal starts, is not installed in {sys.prefix}",
            key="rehearsal",
            cause=Cause.NOT_INSTALLED,
        )
    if settings.on == "gpu" and not gpu.is_usable():
        raise UserError(
            "rehearsal.on: gpu, and there is none here; use null-gpu or cpu",
            key="rehearsal.on",
            cause=Cause.NOT_FOUND,
        )
    if settings.on == "null-gpu" and not null_gpu.is_on_null_gpu():
        small = [_shrink_job(job, settings, Path()).config for job in jobs]
        gpus = [
            null_gpu.num_null_gpus(small_config, job.verb)
            for small_config, job in zip(small, jobs, strict=True)
        ]
        if null_gpu.run_on_null_gpu(sys.argv[1:], max(gpus)):
            raise RunError("rehearse: it has failed on the null GPU, see above")
        return
    first_by_identity: dict[str, str] = {}
    for job in jobs:
        first = first_by_identity.setdefault(_miniature_identity(job, settings), job.name)
        if first == job.name:
            _rehearse_job(job, settings)
        else:
            print(f"{job.name}: in miniature it is {first}, and is not repeated", flush=True)


def _miniature_identity(job: RehearsalJob, settings: RehearsalConfig) -> str:
    """Return a text that is equal for runs whose miniatures are."""
    small = _shrink_job(job, settings, Path())
    return repr((job.verb, small.config, small.hf_config))


def _shrink_job(job: RehearsalJob, settings: RehearsalConfig, folder: Path) -> miniature.Miniature:
    hf_config = read_hf_config(job.config.model.path, None)
    return miniature.make_miniature(
        job.config, hf_config, folder, settings.max_ranks, device=settings.on
    )


def _rehearse_job(job: RehearsalJob, settings: RehearsalConfig) -> None:
    config = job.config
    folder = Path(settings.folder or f"{config.run.folder}-rehearsal") / job.name
    hf_config = read_hf_config(config.model.path, None)
    small = _shrink_job(job, settings, folder)
    with RunFolder(folder) as lock:
        if (folder / "recipe.yaml").exists():
            raise UserError(
                f"rehearsal.folder: {lock.path} has an earlier rehearsal; remove it, or choose "
                "another folder",
                key="rehearsal.folder",
                cause=Cause.EXISTS,
            )
        written = miniature.write_miniature(small, job.verb)
        ranks = "no" if job.verb == "sample" else small.config.parallel.processes
        print(f"{job.name}: {job.verb} with {ranks} trainer ranks in {folder}", flush=True)
        rows = coverage.structure_rows(
            config, hf_config, small.config, job.verb, device=settings.on
        )
        with served_reward_models.serve_reward_models(
            small.config, small.hf_config, folder, job.verb
        ) as addresses:
            run = (job.verb, written, small.config, addresses)
            phases = PhaseRunner(*run, settings.timeout_seconds, _announce_phase).run()
        coverage.write_coverage(folder, job.name, rows, phases, small.changes)


def _announce_phase(phase: str) -> None:
    print(f"  {phase} …", flush=True)
