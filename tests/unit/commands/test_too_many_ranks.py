"""Batches too small for the trainer's ranks are refused before anything else is looked at."""

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands import reward_model, rl, sft
from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import check_batches

RL = {"prompts_per_rollout": 4, "group_size": 4, "minibatches": 2}


@pytest.mark.parametrize(
    ("command", "sections", "key", "shown"),
    [
        (rl, {"rl": RL}, "rl.minibatches", (8, 16)),
        (sft, {"sft": {"batch_size": 15}}, "sft.batch_size", (15, 16)),
        (
            *(reward_model, {"model": {"head": "score"}, "reward_model": {"batch_size": 9}}),
            *("reward_model.batch_size", (9, 16, 18)),
        ),
    ],
)
@pytest.mark.parametrize("under_torchrun", [False, True])
def test_too_few_samples_are_refused_first(
    monkeypatch, tmp_path, command, sections, key, shown, under_torchrun
):
    processes = 32
    if under_torchrun:
        monkeypatch.setenv("MEGATRON_R1_WORLD_SIZE", "32")
        processes = 1
    sections = sections | {"parallel": {"processes": processes, "tensor": 2}}
    model = {"path": str(tmp_path / "absent"), **sections.pop("model", {})}
    config = Config.model_validate({"model": model, "run": {"folder": str(tmp_path)}, **sections})
    with refused(key, Cause.OUT_OF_RANGE, *shown):
        command.run(config)


def test_a_sample_for_every_rank_is_enough():
    config = Config.model_validate({"rl": RL, "parallel": {"tensor": 2}})
    check_batches(config, "rl", 16)
    one = RL | {"minibatches": 1, "prompts_per_rollout": 1}
    with refused("rl.prompts_per_rollout", Cause.OUT_OF_RANGE, 4, 8):
        check_batches(Config.model_validate({"rl": one, "parallel": {"tensor": 2}}), "rl", 16)
