"""The model that `why` reads from a checkpoint is transformers' own, in every architecture."""

import json

import pytest
import torch
from random_folder import write_folder
from small_models import MODELS

from megatron_r1.models.transformers_model import load_with_transformers
from megatron_r1.why.policy.checkpoint_model import MOMENT_NAMES, STATE_PREFIX, read_model
from megatron_r1.why.policy.routed_experts import chosen_experts
from megatron_r1.why.policy.token_rows import TokenRow as Sequence


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num(posinf=7.0)


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_read_as_transformers_reads_the_folder(name, convert, tmp_path):
    folder = write_folder(tmp_path / "hf", MODELS[name], torch.float32)
    status, printed = convert("from-hf", folder, tmp_path / "checkpoint")
    assert status == 0, printed
    own = read_model(tmp_path / "checkpoint", folder).state_dict()
    config = json.loads((folder / "config.json").read_text())
    theirs = load_with_transformers(folder, config, torch.float32).state_dict()
    assert own.keys() == theirs.keys()
    assert [key for key in own if not torch.equal(bits(own[key]), bits(theirs[key]))] == []
    # The checkpoint has no moments: what a part lacks is the weights'.
    part = read_model(
        tmp_path / "checkpoint", folder, f"{STATE_PREFIX}{MOMENT_NAMES[0]}."
    ).state_dict()
    assert all(torch.equal(bits(part[key]), bits(own[key])) for key in own)


@pytest.mark.parametrize("name", ["deepseek-plain-noqlora", "qwen3-moe", "gpt-oss"])
def test_the_experts_of_a_token_are_those_of_its_router(name, tmp_path):
    hf_config = MODELS[name]
    folder = write_folder(tmp_path / "hf", hf_config, torch.float32)
    model = read_model(folder, folder)
    for parameter in model.parameters():
        parameter.data.nan_to_num_(posinf=1.0)
    ids = torch.arange(6)
    row = Sequence(ids, ids >= 2, torch.zeros(4), 0, 1.0, 4)
    chosen = chosen_experts(model, [row])
    count = hf_config.get("num_experts_per_tok") or hf_config.get("experts_per_token")
    assert chosen
    for experts in chosen.values():
        (own,) = experts
        assert own.shape == (4, count)
        assert all(len(set(each)) == count for each in own.tolist())
