"""`logits_of_megatron.py CHECKPOINT HF_DIR DTYPE OUT`: Megatron's logits of fixed tokens, in fp32;
of a score model the score after each.

The checkpoint is loaded by Megatron's own code and its weights are rounded to DTYPE, as HF_DIR's
are; the FP8 weights of HF_DIR are read instead where DTYPE is FP8.
"""

import sys
from pathlib import Path

from megatron_r1 import platform

platform.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fixed_tokens import fixed_tokens  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_r1 import models, weights  # noqa: E402
from megatron_r1.models.hf_config import has_score_head  # noqa: E402
from megatron_r1.weights.stored.dcp_reading import DistributedCheckpoint  # noqa: E402


def load(model, hf: dict, checkpoint: Path, folder: Path, dtype: str) -> None:
    """Fill `model` with the weights as they are in `folder`."""
    if dtype == "float8_e4m3fn":
        weights.load_hf([model], hf, folder)
        return
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = model.sharded_state_dict(metadata={"dp_cp_group": group})
    wanted = {name: entry for name, entry in wanted.items() if "_extra_state" not in name}
    held = DistributedCheckpoint(checkpoint)
    keys = {e.key for e in dist_checkpointing.dict_utils.nested_values(wanted)}
    if keys <= held.shapes.keys():
        model.load_state_dict(dist_checkpointing.load({"model": wanted}, str(checkpoint))["model"])
    else:
        # Saved by the other kind of layers, whose names Megatron itself does not look for.
        weights.load_megatron([model], hf, checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))


def main(checkpoint: str, folder: str, dtype: str, out: str) -> None:
    backend = platform.distributed_backend()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    hf = models.read_hf_config(folder, None)
    with_mtp = any(key.startswith("mtp.") for key in DistributedCheckpoint(checkpoint).shapes)
    config = models.transformer_config(hf, params_dtype=torch.float32, with_mtp=with_mtp)
    model = models.build_model(hf, config).to(platform.device()).eval()
    load(model, hf, Path(checkpoint), Path(folder), dtype)
    tokens = fixed_tokens(hf["vocab_size"]).to(platform.device())
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        hidden = model(tokens, positions, None)
        logits = hidden if has_score_head(hf) else models.logits(model, hidden)
    torch.save(logits.view(*tokens.shape, -1)[..., : hf["vocab_size"]].cpu().clone(), out)


main(*sys.argv[1:])
