"""Models with adapters on these ranks: `lora_steps.py ORACLE OUT NAME+NAME|all GRID…`.

Logits, every gradient, the merged export and the adapters' own export, compared with transformers'.
"""

import sys
from pathlib import Path

from megatron_r1.models import platform

platform.prepare_process()

import against_transformers as base  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from grids import parallel_settings  # noqa: E402
from lora_shapes import ALPHA, MODELS, RANK, compared_on  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from safetensors.torch import load_file  # noqa: E402

from megatron_r1 import models  # noqa: E402
from megatron_r1.config import Config  # noqa: E402
from megatron_r1.models import weights  # noqa: E402
from megatron_r1.models.weights.adapter_table import PEFT_PREFIX  # noqa: E402
from megatron_r1.models.weights.adapters import adapter_pieces, save_adapter  # noqa: E402
from megatron_r1.trainer import construction, distributed  # noqa: E402


def build(folder: Path, targets, grid: str):
    """This rank's chunks with adapters, in DDP, and the recipe."""
    recipe = Config.model_validate(
        {
            "model": {
                "path": str(folder),
                "dtype": "float32",
                "lora": {"rank": RANK, "alpha": ALPHA, "targets": targets},
            },
            "parallel": parallel_settings(grid),
        }
    )
    grid_position = distributed.initialize(recipe.parallel, seed=1)
    hf_config = models.read_hf_config(folder)
    config = models.transformer_config(hf_config, recipe)
    bare = construction.build_chunks(recipe, hf_config, config, grid_position.groups)
    config.finalize_model_grads_func = finalize_model_grads
    # Not construction._with_gradients, after which a rank has its part of the gradients only.
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    return recipe, hf_config, bare, [DistributedDataParallel(config, ddp, chunk) for chunk in bare]


def fill(chunks, file: Path) -> None:
    factors = load_file(file)
    with torch.no_grad():
        for factor, pieces, _ in adapter_pieces(chunks):
            for piece in pieces:
                values = factors[piece.hf_name].narrow(piece.dim, piece.hf_start, piece.length)
                factor.narrow(piece.dim, piece.local_start, piece.length).copy_(values)


def compare(name: str, grid: str, oracle: Path, out: Path) -> None:
    folder, sequences = oracle / name, torch.load(oracle / "sequences.pt")
    recipe, hf_config, bare, chunks = build(folder, MODELS[name][1], grid)
    trained = {n for chunk in bare for n, p in chunk.named_parameters() if p.requires_grad}
    assert trained and all(n.endswith((".lora.a", ".lora.b")) for n in trained), trained
    weights.write_hf(chunks, hf_config, out / "start.safetensors", dtype=torch.float32)
    fill(bare, folder / "adapter.safetensors")
    groups = [sequences[0:1], sequences[1:2], sequences[2:5], sequences[5:6]]
    ranks = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    mine = range(rank * len(groups) // ranks, (rank + 1) * len(groups) // ranks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    results = base.run(base.packed_step, chunks, [base.pack(groups[i]) for i in mine], False)
    difference, logits = 0.0, torch.load(folder / "logits.pt")
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        for index, result in zip(mine, results, strict=True):
            start = sum(len(group) for group in groups[:index])
            expected = torch.cat(logits[start : start + len(groups[index])])
            got = base.unpack(result["logits"], groups[index])[:, : hf_config["vocab_size"]]
            difference = max(difference, (got - expected).abs().max())
    base.report(name, grid, "logits", difference, base.LOGIT_TOLERANCE)

    same_tensors(chunks, hf_config, recipe, folder, out, name, grid)
    with torch.no_grad():
        for factor, _, _ in adapter_pieces(bare):
            factor.copy_(factor.main_grad)
    adapter = out / "gradients"
    save_adapter(chunks, hf_config, recipe.model.lora, str(folder), adapter, torch.float32)
    got, expected = load_file(adapter / "adapter_model.safetensors"), {}
    expected = load_file(folder / "gradients.safetensors")
    worst, where = 0.0, None
    for key, gradient in expected.items():
        gap = (got[PEFT_PREFIX + key] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-4)
        if gap > worst:
            worst, where = gap.item(), key
    base.report(name, grid, f"{len(expected)} gradients ({where})", worst, base.GRADIENT_TOLERANCE)
    dist.barrier()


def same_tensors(chunks, hf_config, recipe, folder: Path, out: Path, name: str, grid: str) -> None:
    """New adapters change nothing; those of the file come back in PEFT's format and merged."""
    start, origin = load_file(out / "start.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(start[key], origin[key]) for key in start)
    adapter = out / f"adapter-{name}"
    save_adapter(chunks, hf_config, recipe.model.lora, str(folder), adapter, torch.float32)
    saved = load_file(adapter / "adapter_model.safetensors")
    factors = load_file(folder / "adapter.safetensors")
    assert saved.keys() == {PEFT_PREFIX + key for key in factors}, saved.keys() ^ factors.keys()
    assert all(torch.equal(saved[PEFT_PREFIX + key], factors[key]) for key in factors)
    weights.save_hf(chunks, hf_config, folder, out / "hf", torch.float32)
    merged = load_file(out / "hf" / "model.safetensors")
    expected = load_file(folder / "merged" / "model.safetensors")
    gap = max((merged[key] - expected[key]).abs().max().item() for key in merged)
    base.report(name, grid, "merged weights", gap, 1e-6)


def main() -> None:
    oracle, out, names, *grids = sys.argv[1:]
    for grid in grids:
        for name in names.split("+") if names != "all" else compared_on(grid):
            compare(name, grid, Path(oracle), Path(out))
            parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
