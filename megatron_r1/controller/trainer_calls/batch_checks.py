"""Refuses recipes whose batches are too small for the data-parallel ranks."""

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.reporting.formatting import format_count


def check_batches(config: Config, verb: str, world_size: int, rank: str = "trainer rank") -> None:
    """Refuse batches that do not give each data-parallel rank a sample.

    Args:
        config: the recipe.
        verb: rl, sft or reward-model.
        world_size: the number of ranks, the data-parallel ones among them.
        rank: what a data-parallel rank is called.

    Raises:
        UserError: an optimizer step has too few samples."""
    rl, item = config.rl, "sample"
    data_parallel_size = config.parallel.data_parallel_size(world_size)
    if verb == "rl":
        num_samples = rl.prompts_per_rollout * rl.group_size // rl.minibatches
        key, remedy = "rl.prompts_per_rollout", "raise rl.prompts_per_rollout"
        if rl.minibatches > 1:
            key, remedy = "rl.minibatches", f"lower rl.minibatches={rl.minibatches}"
    else:
        section = verb.replace("-", "_")
        key, num_samples = f"{section}.batch_size", getattr(config, section).batch_size
        remedy = f"raise {key}"
        if verb == "reward-model" and config.reward_model.kind == "pairwise":
            item = "pair"  # stays together on one rank (`samples_per_unit`)
    if num_samples < data_parallel_size:
        max_ranks = num_samples * (world_size // data_parallel_size)
        raise UserError(
            f"{format_count(num_samples, item)} of an optimizer step cannot be spread over "
            f"{data_parallel_size:,} data-parallel ranks; {remedy}, raise parallel.context, "
            f".tensor or .pipeline, or use at most {format_count(max_ranks, rank)}",
            key=key,
            cause=Cause.OUT_OF_RANGE,
        )
