"""Samples of a micro-batch that share their prompt (`parallel.share_prompts`).

A shared prompt is computed once (`models.prefixes`); `controller.trainer_calls.packing` packs its
samples together. All tokens of the prompt are shared but the last, which predicts another token in
every response.

Imports neither torch nor Megatron, because the controller imports it."""

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.trainer.training_sample import Sample


def check_shared_prompts(config: Config, on_gpu: bool, is_plain: bool) -> None:
    """Raise UserError where `parallel.share_prompts` does not go with the device, the model or a
    setting.

    Args:
        config: the recipe.
        on_gpu: whether the trainer runs on a GPU.
        is_plain: whether attention has neither windows nor softmax offsets."""
    if not config.parallel.share_prompts:
        return
    obstacles = {
        "a GPU, whose attention has no shared prefix": on_gpu,
        f"parallel.context: {config.parallel.context}": config.parallel.context > 1,
        "a model with attention windows or softmax offsets": not is_plain,
        "rl.routing_replay": config.rl.routing_replay,
        "model.mtp: train": config.model.mtp == "train",
        "model.expert_bias_update_rate, which counts tokens": config.model.expert_bias_update_rate
        > 0,
    }
    if found := [name for name, is_there in obstacles.items() if is_there]:
        raise UserError(
            f"parallel.share_prompts: true does not go with {found[0]}; leave it out",
            key="parallel.share_prompts",
            cause=Cause.CONFLICT,
        )


def shared_prefixes(samples: list[Sample]) -> list[tuple[list[int], int]]:
    """Return (indices of the samples, number of shared tokens) for every prompt that has at least
    two tokens and two samples."""
    return [
        (members, length)
        for members in by_prompt(samples)
        if len(members) > 1 and (length := samples[members[0]].prompt_length - 1)
    ]


def by_prompt(samples: list[Sample]) -> list[list[int]]:
    """Return the indices of the samples of each prompt."""
    found: dict[bytes, list[int]] = {}
    for number, sample in enumerate(samples):
        prompt = bytes(sample.token_ids[: 4 * sample.prompt_length])
        found.setdefault(prompt, []).append(number)
    return list(found.values())
