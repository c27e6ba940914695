"""A quantized model folder as transformers and vLLM can load it on a CPU: with weights in fp32.

Their own dequantization there takes an optional package, wants a GPU, or assumes evenly cut blocks
and so refuses or misreads matrices with a partial last block, such as DeepSeek-V3's kv_a_proj of
576 rows (integrations/finegrained_fp8.py, transformers 5.19)."""

import json
from pathlib import Path

from safetensors.torch import save_file

from megatron_r1.models.weights.stacked import published_tensors
from megatron_r1.models.weights.stored.hf_folder import carry_files
from megatron_r1.models.weights.stored.hf_weights import HfWeights


def write_plain(weights: HfWeights, folder: Path) -> None:
    """Write the checked `weights` with their tokenizer and configuration into `folder`. All of them
    are in memory at once."""
    folder.mkdir(parents=True, exist_ok=True)
    carry_files(weights.path, folder)
    config = json.loads((weights.path / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        name: weights.whole(name).float().contiguous()
        for name in published_tensors(weights.hf)
        if weights.has(name)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
