"""Says what memory a run takes, and what it keeps on disk, before it starts."""

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.commands.parts import torchrun
from megatron_r1.commands.parts.cpu_memory import cpu_memory
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.rollout import Rollout
from megatron_r1.controller.rollouts.sample_log import encode, to_record
from megatron_r1.engines.server import gpu
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.memory import ParameterCounts, checkpoint_bytes, parameter_bytes
from megatron_r1.models.weights import num_parameters
from megatron_r1.models.weights.adapter_table import num_adapter_parameters
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.pass_memory import NOT_ASKED, not_asked, pass_memory, pass_tokens
from megatron_r1.push.matching.recipe_plan import engine_rank_bytes, engine_weight_bytes
from megatron_r1.reporting.formatting import format_count


def kept_files_lines(config: Config, rollout: Rollout, fraction: float) -> list[str]:
    """Return a sentence per setting that keeps every step's samples, or further checkpoints.

    Args:
        config: the recipe.
        rollout: the rollout that was tried.
        fraction: a step's responses over those of `rollout`."""
    lines, steps = [], config.run.steps
    if config.rl.keep_sample_log:
        size = sum(len(encode(to_record(0, group))) for group in rollout.groups) * fraction
        lines.append(
            f"rl.keep_sample_log: {size / 1e6:,.1f} MB a step at this length, "
            f"{size * steps / 1e9:,.2f} GB in all"
        )
    if interval := config.checkpoint.keep_every:
        counts = ParameterCounts(dense=_num_saved(config))
        size = checkpoint_bytes(config, counts, (1, 1), with_reference=config.uses_reference)
        lines.append(
            f"checkpoint.keep_every: {interval}: {format_count(steps // interval, 'checkpoint')} "
            f"of {size / 1e9:,.2f} GB"
        )
    return lines


def _num_saved(config: Config) -> int:
    """Return how many parameters a checkpoint has: the factors of adapters, or the model's."""
    hf_config = read_hf_config(config.model.path)
    if config.model.lora is None:
        return num_parameters(hf_config)
    return num_adapter_parameters(hf_config, config.model.lora)


def _describe_passes(config: Config, hf_config: HFConfig) -> str:
    """Return what an engine's passes take on a GPU, by kind."""
    rollout = config.rollout
    ranks = rollout.tensor_parallel * rollout.data_parallel
    hardware = HARDWARE["B200" if gpu.architecture() == 10 else "H100"]
    job = PlannedJob(hf_config, config, 1, hardware, rollout_gpus=ranks * rollout.engines)
    parts = pass_memory(job, pass_tokens(job))
    sizes = ", ".join(f"{name} {part}" for name, part in parts.items())
    names = ", ".join(not_asked(parts))
    return f"an engine's passes take on each GPU: {sizes}" + f"; {NOT_ASKED}: {names}" * bool(names)


def describe_run_memory(config: Config) -> str:
    """Return a sentence on the memory that the run takes.

    Raises:
        UserError: the run does not fit into this host's memory.
    """
    parameters = num_parameters(read_hf_config(config.model.path), with_mtp=False)
    size = f"{parameters / 1e6:,.1f}M parameters; "
    if gpu.is_usable():
        hf_config = read_hf_config(config.model.path)
        weight_bytes = engine_weight_bytes(config, hf_config)
        pushed_bytes = engine_rank_bytes(config, hf_config)
        place = "there too" if TRANSPORTS[config.push.transport].needs_gpu else "on its host"
        sizes = parameter_bytes(config.model.dtype, config.optimizer.moments)
        return (
            f"{size}{parameters * sizes.total / 2**30:,.2f} GiB for weights, gradients and "
            "optimizer, over all tensor, pipeline and expert ranks; activations come "
            f"on top (megatron-r1 plan); {weight_bytes / 2**30:,.2f} GiB of weights on an engine's "
            f"fullest GPU, and {pushed_bytes / 2**30:,.2f} GiB for those of the next push, {place} "
            f"(push.transport: {config.push.transport}); {_describe_passes(config, hf_config)}"
        )
    memory = cpu_memory(config, torchrun.world_size(config), has_engines=True)
    memory_text = memory.describe(memory.microbatch_tokens(config.parallel.tokens_per_microbatch))
    mib = engine_rank_bytes(config, read_hf_config(config.model.path)) / 2**20
    return f"{size}{memory_text}; a push brings {mib:,.2f} MiB to an engine's fullest rank"
