"""Who reads what of a checkpoint: `shared_reads.py FOLDER OUT GRID…`, on two ranks.

Each number of the model is read by one rank of all, and arrives on every replica; a tensor that one
rank cannot read is refused on all. Fails on the first expectation that does not hold."""

import hashlib
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from grids import parallel_settings
from safetensors.torch import load_file

from megatron_r1 import models
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models import weights
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.trainer import distributed

MODEL = "deepseek-yarn-mtp"
BROKEN = "model.layers.1.self_attn.o_proj.weight"


def digest(chunk) -> str:
    hasher = hashlib.sha256()
    for _, tensor in sorted(chunk.state_dict(keep_vars=True).items()):
        if torch.is_tensor(tensor):
            hasher.update(tensor.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def check(folder: Path, out: Path, grid: str) -> None:
    settings = {
        "model": {"path": str(folder / MODEL), "dtype": "float32", "mtp": "train"},
        "parallel": {**parallel_settings(grid), "threads": 1},
    }
    config = Config.model_validate(settings)
    grid_position = distributed.initialize(config.parallel, seed=0)
    hf_config = models.read_hf_config(folder / MODEL)
    chunk = models.build_model(
        hf_config, models.transformer_config(hf_config, config), grid_position.groups
    )
    read, numbers = HFWeights.read, []

    def counted(self, name: str, *part):
        values = read(self, name, *part)
        numbers.append(values.numel())
        return values

    with patch.object(HFWeights, "read", counted):
        weights.load_hf([chunk], hf_config, folder / MODEL)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (sum(numbers), digest(chunk)))
    expected = load_file(folder / MODEL / "model.safetensors")
    sizes = sum(tensor.numel() for name, tensor in expected.items() if not is_copy(name))
    assert sum(found for found, _ in everyone) == sizes, (grid, everyone, sizes)
    assert max(found for found, _ in everyone) < 0.7 * sizes, (grid, everyone, sizes)
    if grid != "ep2":
        assert len({digest for _, digest in everyone}) == 1, grid
    weights.write_hf([chunk], hf_config, out / "again.safetensors", dtype=torch.float32)
    again = load_file(out / "again.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items()), grid

    def broken(self, name: str, *part):
        if name == BROKEN:
            raise UserError(f"{name} is cut off", key="model.path", cause=Cause.MALFORMED)
        return read(self, name, *part)

    with patch.object(HFWeights, "read", broken):
        try:
            weights.load_hf([chunk], hf_config, folder / MODEL)
            refused = None
        except UserError as error:
            refused = str(error), error.key, error.cause
    assert refused == (f"{BROKEN} is cut off", "model.path", Cause.MALFORMED), (grid, refused)


def is_copy(name: str) -> bool:
    """Whether this is an MTP layer's copy of the embedding or the head, which is not read."""
    return ".layers." in name and name.endswith(("embed_tokens.weight", "shared_head.head.weight"))


def main() -> None:
    folder, out, *names = sys.argv[1:]
    for grid in names:
        check(Path(folder), Path(out), grid)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        if dist.get_rank() == 0:
            print(f"{grid} holds", flush=True)
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
