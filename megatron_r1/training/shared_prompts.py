"""Packs samples of one prompt together, so that a micro-batch computes the prompt once
(`models.prefixes`).

All tokens of the prompt are shared but the last, which predicts another token in every response."""

from collections.abc import Callable, Iterable

from megatron_r1.config import Config
from megatron_r1.errors import UserError
from megatron_r1.training.packing import Packing, pack
from megatron_r1.training.wire import Sample


def check_shared_prompts(config: Config, on_gpu: bool, is_plain: bool) -> None:
    """Raise UserError where `parallel.share_prompts` does not go with the device, the model or a
    setting. is_plain: whether attention has neither windows nor softmax offsets."""
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
        raise UserError(f"parallel.share_prompts: true does not go with {found[0]}; leave it out")


def shared_prefixes(samples: list[Sample]) -> list[tuple[list[int], int]]:
    """Return (indices of the samples, number of shared tokens) for every prompt that has at least
    two tokens and two samples."""
    return [
        (members, length)
        for members in _by_prompt(samples)
        if len(members) > 1 and (length := samples[members[0]].prompt_length - 1)
    ]


def pack_by_prompt(
    samples: list[Sample], ranks: int, limit: int, cost: Callable[[int], float]
) -> Packing:
    """Return `packing.pack` of the samples, in units of those with one prompt, which counts once.

    A unit has at most `limit` tokens; with fewer units than ranks every sample is one. cost: the
    argument of `pack`."""
    units = [unit for members in _by_prompt(samples) for unit in _within(samples, members, limit)]
    if len(units) < ranks:
        units = [[i] for i in range(len(samples))]
    lengths = [_shared_length(samples, unit) for unit in units]
    packing = pack(lengths, ranks, limit, cost=cost)
    shares = [[[i for u in m for i in units[u]] for m in own] for own in packing.shares]
    return packing._replace(shares=shares)


def _by_prompt(samples: list[Sample]) -> list[list[int]]:
    found: dict[bytes, list[int]] = {}
    for number, sample in enumerate(samples):
        prompt = bytes(sample.token_ids[: 4 * sample.prompt_length])
        found.setdefault(prompt, []).append(number)
    return list(found.values())


def _within(samples: list[Sample], members: Iterable[int], limit: int) -> list[list[int]]:
    """Cut samples of one prompt, in order, into units of at most `limit` tokens, or one sample."""
    units: list[list[int]] = []
    for member in members:
        if units and _shared_length(samples, [*units[-1], member]) <= limit:
            units[-1].append(member)
        else:
            units.append([member])
    return units


def _shared_length(samples: list[Sample], unit: list[int]) -> int:
    saved = samples[unit[0]].prompt_length - 1
    return sum(len(samples[i]) for i in unit) - saved * (len(unit) - 1)
