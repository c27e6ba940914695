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
from megatron_r1.commands.parts.trainer_checks import check_trainer
from megatron_r1.commands.rehearsal_jobs import RehearsalJob, rehearsal_jobs
from megatron_r1.config import Config
from megatron_r1.config.overrides import take_section
from megatron_r1.controller.rollouts.players import find_player
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.engines.server.recipe_checks import check_engines
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.push.matching.planned_links import links_per_rank
from megatron_r1.push.matching.recipe_plan import check_pushes, engine_layout, planned_push
from megatron_r1.rehearse import coverage, miniature, null_gpu, served_reward_models
from megatron_r1.rehearse.phases import PhaseRunner
from megatron_r1.rehearse.settings import RehearsalConfig, RehearsalRecipe
from megatron_r1.reporting.run_folder import RunFolder

SETTINGS = ("rehearsal",)
SHORT_OPTIONS = {"on": "rehearsal.on"}
IMPLIED_BY_VERB = {"reward-model": reward_model.IMPLIED_SETTINGS}
MAX_LINKS = 100
"""Most links of a trainer rank beyond those that the numbers of ranks require. The recipe for 2,048
GPUs has 17; with links between nearly all pairs of ranks it would have 1,185."""
PAIR_REQUESTS = 4
"""Requests to the store for a pair of ranks: each sets its address and gets the other's."""
MAX_REQUESTS = 1_000_000
"""Most requests of all pairs. One store answers about 25,000 a second (`plan.assumptions`)."""


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


def check_full_size(config: Config, verb: str) -> None:
    """Raise UserError for what the full-size run would refuse, since its miniature may no longer
    have it.

    Args:
        config: the recipe as its verb would read it.
        verb: the subcommand of megatron-r1."""
    hf_config = read_hf_config(config.model.path, None)
    if verb in ("rl", "sample"):
        check_engines(config, hf_config)
        if not null_gpu.is_on_null_gpu():  # there the command that started this one has asked vLLM
            check_arguments(config.rollout, "rollout")
        max_model_len(config)
    if verb != "sample":
        check_trainer(config, verb)
    if verb == "rl":
        find_player(config)
        check_pushes(config, hf_config, config.parallel.processes)
        check_connections(config, hf_config)


def check_connections(config: Config, hf_config: HFConfig) -> None:
    """Refuse a push whose full size connects too many ranks, with UserError."""
    if not config.push.on_one_node:  # in shared memory a link costs nothing
        links = links_per_rank(planned_push(config, hf_config), config.parallel.processes)
        check_links(links, engine_layout(config).num_ranks)


def check_links(links: list[int], engine_ranks: int) -> None:
    """Refuse too many links between trainer ranks and engine ranks.

    Args:
        links: how many each trainer rank has to engine ranks.
        engine_ranks: the number of engine ranks.

    Raises:
        UserError: for too many links."""
    largest, pairs = max(links), sum(links)
    required = -(-engine_ranks // len(links))
    limit, requests = MAX_LINKS * required, PAIR_REQUESTS * pairs
    if largest <= limit and requests <= MAX_REQUESTS:
        return
    raise UserError(
        f"push: at full size a trainer rank would have {largest:,} links to engine ranks (at most "
        f"{limit:,}), and {pairs:,} pairs would make {requests:,} requests to one store when they "
        f"connect (at most {MAX_REQUESTS:,}); use fewer rollout.engines",
        key="rollout.engines",
        cause=Cause.TOO_LARGE,
    )


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
