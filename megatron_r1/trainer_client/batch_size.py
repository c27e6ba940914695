"""Whether a recipe's batches have a sample for every data-parallel rank."""

from megatron_r1.config import Config
from megatron_r1.errors import Cause, UserError
from megatron_r1.reporting.wording import counted


def check_batches(config: Config, verb: str, world_size: int, rank: str = "trainer rank") -> None:
    """Raise UserError where an optimizer step of rl, sft or reward-model has too few samples for
    the data-parallel ranks among `world_size`. rank: what one of these is called."""
    rl, replicas, item = config.rl, config.parallel.num_replicas(world_size), "sample"
    if verb == "rl":
        num_samples = rl.questions_per_rollout * rl.group_size // rl.minibatches
        key, more = "rl.questions_per_rollout", "raise rl.questions_per_rollout"
        if rl.minibatches > 1:
            key, more = "rl.minibatches", f"lower rl.minibatches={rl.minibatches}"
    else:
        section = verb.replace("-", "_")
        key, num_samples = f"{section}.batch_size", getattr(config, section).batch_size
        more = f"raise {key}"
        if verb == "reward-model" and config.reward_model.kind == "pairwise":
            item = "pair"  # stays together on one rank (`unit` of `pack`)
    if num_samples < replicas:
        most = num_samples * (world_size // replicas)
        raise UserError(
            f"{counted(num_samples, item)} of an optimizer step cannot be spread over "
            f"{replicas:,} data-parallel ranks; {more}, raise parallel.context, .tensor or "
            f".pipeline, or use at most {counted(most, rank)}",
            key=key,
            cause=Cause.OUT_OF_RANGE,
        )
