"""Makes a quantized model folder into one in fp32, which transformers and vLLM can load on a CPU.

Their own dequantization there takes an optional package, wants a GPU, or assumes evenly cut blocks
and so refuses or misreads matrices with a partial last block, such as DeepSeek-V3's kv_a_proj of
576 rows (integrations/finegrained_fp8.py, transformers 5.19)."""

import json
from pathlib import Path

from safetensors.torch import save_file

from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.hf_writer import copy_model_files
from megatron_r1.models.weights.formats.published_layout import published_tensors


def write_dequantized(weights: HFWeights, folder: Path) -> None:
    """Write the checked `weights` with their tokenizer and configuration into `folder`. All of them
    are in memory at once."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_model_files(weights.path, folder)
    config = json.loads((weights.path / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        name: weights.read_whole(name).float().contiguous()
        for name in published_tensors(weights.hf_config)
        if weights.has(name)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
