"""The memory that a CPU's micro-batch is chosen by, against what autograd really keeps."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from small_models import DEEPSEEK, LLAMA, QWEN

from megatron_r1.config import Config
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import sparse_layers
from megatron_r1.models.memory import layer_activations


@pytest.mark.slow
@pytest.mark.parametrize("model", [QWEN, LLAMA, DEEPSEEK], ids=["qwen", "llama", "deepseek"])
def test_activations_of_a_token_are_within_a_tenth(tmp_path, model):
    # Of a shape in which what has the size of a head, not of the model, counts little.
    wider = {"hidden_size": 192, "intermediate_size": 320}
    wider |= {"moe_intermediate_size": 96} if "moe_intermediate_size" in model else {}
    (tmp_path / "config.json").write_text(json.dumps(model | wider))
    folder = Path(__file__).parent
    run_ranks(folder, 1, "saved_activations.py", str(tmp_path), str(tmp_path))
    measured = json.loads((tmp_path / "saved.json").read_text())
    hf_config = read_hf_config(str(tmp_path))
    config = Config.model_validate({"model": {"path": str(tmp_path), "dtype": "float32"}})
    counted = sum(
        layer_activations(hf_config, config, 1, sparse=sparse, local=True).total
        for sparse in sparse_layers(hf_config)
    )
    assert counted == pytest.approx(measured, rel=0.1)
