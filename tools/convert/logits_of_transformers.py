"""`logits_of_transformers.py HF_DIR OUT`: logits (2, 48, vocabulary) of fixed tokens, in fp32; of a
score model the score (2, 48, 1) after each.

FP8 weights are handed to it as fp32: its own dequantisation, which it falls back to on a CPU, takes
the blocks for evenly cut and so refuses or misreads matrices whose last blocks are not whole, such
as DeepSeek-V3's kv_a_proj of 576 rows (integrations/finegrained_fp8.py, transformers 5.19).
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from fixed_tokens import fixed_tokens  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from megatron_r1.models.hf_config import has_score_head, read_hf_config  # noqa: E402
from megatron_r1.weights.stored.hf_weights import HfWeights  # noqa: E402


def plain_copy(folder: Path, out: Path) -> None:
    """The model in `folder` as fp32."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with HfWeights(folder, read_hf_config(folder, None)) as weights:
        values = {
            name: weights.read(name, 0, 0, shape[0]).float().contiguous()
            for name, (shape, _) in weights.tensors.items()
        }
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})


def main(folder: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            plain_copy(folder, Path(scratch))
            folder = Path(scratch)
        scores = has_score_head(read_hf_config(folder, None))
        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=torch.float32).float().eval()
    tokens = fixed_tokens(model.config.vocab_size)
    with torch.no_grad():
        if scores:  # the model itself scores the last token only
            logits = model.score(model.model(tokens).last_hidden_state)
        else:
            logits = model(tokens).logits
    torch.save(logits.clone(), out)


main(Path(sys.argv[1]), Path(sys.argv[2]))
