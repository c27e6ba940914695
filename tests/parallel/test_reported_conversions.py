"""B44, B47, B49: models that a step has changed, read back by transformers or by heart."""

import json
from pathlib import Path

import pytest
import torch
from oracle import mtp_layer, mtp_logits
from ranks import run_ranks
from safetensors.torch import load_file

from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.transformers_model import load_with_transformers

HERE = Path(__file__).parent
# fp32 sums in another order, of logits of standard deviation 1 to 3.
TOLERANCE = 1e-4


def steps(oracle, out, model, grid, world_size, mtp="none", count=1):
    """Make steps; return the folder that was trained, the export, and what the trainer reports."""
    arguments = str(oracle / model), str(out), mtp, str(count), grid
    run_ranks(HERE, world_size, "reported_steps.py", *arguments)
    return oracle / model, out / grid, torch.load(out / f"{grid}.pt", weights_only=False)


def reread(export, found):
    """transformers' log-probabilities of the response by the exported folder."""
    model = load_with_transformers(export, read_hf_config(export), torch.float32).eval()
    ids = torch.tensor([found["ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize(
    ("grid", "world_size"),
    [
        pytest.param("one", 1, marks=pytest.mark.slow),
        ("pp2", 2),
        pytest.param("pp4", 4, marks=pytest.mark.more),
    ],
)
def test_a_tied_embedding_is_one_tensor_on_all_stages(oracle, tmp_path, grid, world_size):
    source, export, found = steps(oracle, tmp_path, "qwen-tied", grid, world_size)
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"] is True
    start = load_file(source / "model.safetensors")
    before = load_file(tmp_path / f"{grid}-before.safetensors")
    assert before.keys() == start.keys() and "lm_head.weight" not in before
    assert all(torch.equal(before[name], start[name].float()) for name in before)
    after = load_file(export / "model.safetensors")
    assert after.keys() == start.keys()
    assert not torch.equal(after["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    # The last stage computes with its own copy, the export has the first one's.
    assert (reread(export, found) - found["logprobs"]).abs().max() < TOLERANCE


@pytest.mark.more
@pytest.mark.parametrize(
    ("grid", "world_size"),
    [
        pytest.param("one", 1, marks=pytest.mark.slow),
        ("tp2", 2),
        pytest.param("pp2", 2, marks=pytest.mark.slow),
    ],
)
def test_gpt_oss_keeps_its_published_names_and_transposed_experts(
    oracle, tmp_path, grid, world_size
):
    source, export, found = steps(oracle, tmp_path, "gpt-oss", grid, world_size)
    start, after = (load_file(each / "model.safetensors") for each in (source, export))
    shapes = {name: tensor.shape for name, tensor in start.items()}
    assert {name: tensor.shape for name, tensor in after.items()} == shapes
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert experts in after and not torch.equal(after[experts], start[experts])
    assert (reread(export, found) - found["logprobs"]).abs().max() < TOLERANCE


def mtp_reads(export, ids):
    """Log-probabilities by the export's MTP layer of the token after the next, for all but two."""
    hf_config = read_hf_config(export)
    model = load_with_transformers(export, hf_config, torch.float32).eval()
    layer, stored = mtp_layer(model, model.config), load_file(export / "model.safetensors")
    prefix = f"model.layers.{hf_config['num_hidden_layers']}."
    for name, tensor in layer.state_dict().items():
        place, _, kind = name.partition("experts.")
        if kind in ("gate_up_proj", "down_proj"):  # of all experts
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            names = [[f"{place}experts.{i}.{p}.weight" for p in parts] for i in range(len(tensor))]
            own = torch.stack([torch.cat([stored[prefix + n] for n in each]) for each in names])
        else:
            own = stored[prefix + name]
        tensor.copy_(own)
    with torch.no_grad():
        logprobs = mtp_logits(model, layer, ids)[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 2:, None])[:, 0]


@pytest.mark.more
def test_mtp_layers_learn_by_heart_the_token_after_the_next(oracle, tmp_path):
    source, export, found = steps(
        oracle, tmp_path, "deepseek-yarn-mtp", "one", 1, mtp="train", count=80
    )
    ids = torch.tensor([found["ids"]])
    assert len(set(found["ids"])) == 8
    assert found["reports"][-1]["loss"] < 0.01
    assert mtp_reads(source, ids).mean() < -1
    assert mtp_reads(export, ids).min() > -0.05
