"""Logits (2, 48, vocabulary) of fixed tokens in fp32, by Megatron and by transformers.

`python -m megatron_r1.commands.convert.logits megatron CHECKPOINT HF_DIR DTYPE OUT`
`python -m megatron_r1.commands.convert.logits transformers HF_DIR OUT`

Of a score model: the score (2, 48, 1) after each token. Each library runs in a process of its own,
as transformers must not see the replacements that Megatron needs on a CPU."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.hf_config_file import read_hf_config


def _fixed_tokens(vocabulary: int) -> torch.Tensor:
    """Return (2, 48) token ids that are spread over the vocabulary."""
    return (torch.arange(96).view(2, 48) * 7919 + 13) % vocabulary


def megatron_logits(checkpoint: Path, folder: Path, dtype: str) -> torch.Tensor:
    """Load the checkpoint by Megatron's own code, round its weights to `dtype`, return the logits.

    For FP8, the weights of the Hugging Face folder are read instead.

    Args:
        checkpoint: the checkpoint's folder.
        folder: the Hugging Face folder that was made of it.
        dtype: the dtype of the weights in `folder`, or "fp8"."""
    from megatron_r1.models import platform

    platform.prepare_process()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_r1 import models
    from megatron_r1.config import Config, ModelConfig
    from megatron_r1.models import patches, weights
    from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint

    patches.install()
    backend = platform.distributed_backend()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    hf_config = models.read_hf_config(str(folder), None)
    with_mtp = any(key.startswith("mtp.") for key in DistributedCheckpoint(checkpoint).shapes)
    recipe = Config(model=ModelConfig(dtype="float32", mtp="frozen" if with_mtp else "none"))
    config = models.transformer_config(hf_config, recipe)
    model = models.build_model(hf_config, config).to(platform.device()).eval()
    if dtype == "float8_e4m3fn":
        weights.load_hf([model], hf_config, folder)
    else:
        _load_checkpoint(model, hf_config, checkpoint)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)))
    tokens = _fixed_tokens(hf_config["vocab_size"]).to(platform.device())
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        hidden = model(tokens, positions, None)
        logits = hidden if has_score_head(hf_config) else models.compute_logits(model, hidden)
    return logits.view(*tokens.shape, -1)[..., : hf_config["vocab_size"]].cpu()


def _load_checkpoint(model: Any, hf_config: HFConfig, checkpoint: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_r1.models import weights
    from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
    from megatron_r1.trainer.checkpoints.contents import load_weights, without_extra_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={"dp_cp_group": group})
    state = without_extra_state(state)
    keys = {entry.key for entry in dist_checkpointing.dict_utils.nested_values(state)}
    if keys <= DistributedCheckpoint(checkpoint).shapes.keys():
        load_weights(model, dist_checkpointing.load({"model": state}, str(checkpoint))["model"])
    else:
        # Saved by the other kind of layers, whose names Megatron itself does not look for.
        weights.load_megatron([model], hf_config, checkpoint)


def _transformers_logits(folder: Path, scratch: Path) -> torch.Tensor:
    """Load the folder by transformers and return the logits. FP8 weights are passed as fp32
    (`write_dequantized`).

    Args:
        folder: the Hugging Face folder.
        scratch: an empty folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from megatron_r1.models.transformers_model import load_with_transformers
    from megatron_r1.models.weights.formats.dequantized_folder import write_dequantized
    from megatron_r1.models.weights.formats.hf_folder import HFWeights

    hf_config = read_hf_config(str(folder), None)
    if "quantization_config" in hf_config:
        with HFWeights(folder, hf_config) as weights:
            write_dequantized(weights, scratch)
        folder = scratch
    scores = has_score_head(hf_config)
    model = load_with_transformers(folder, hf_config, torch.float32).float().eval()
    tokens = _fixed_tokens(model.config.vocab_size)
    with torch.no_grad():
        if scores:  # the model itself scores the last token only
            return model.score(model.model(tokens).last_hidden_state)
        return model(tokens).logits


def main(library: str, *arguments: str) -> None:
    """Write the logits of a library into the file that is the last argument."""
    *inputs, out = arguments
    if library == "megatron":
        checkpoint, folder, dtype = inputs
        logits = megatron_logits(Path(checkpoint), Path(folder), dtype)
    else:
        with tempfile.TemporaryDirectory(dir=Path(out).parent) as scratch:
            logits = _transformers_logits(Path(inputs[0]), Path(scratch))
    torch.save(logits.clone(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
