"""Compare Megatron with transformers here: `against_transformers.py ORACLE OUT SET GRID…`.

Grids are named as in `grids`, sets as in `random_models`. For every model that allows it: the loss
and every gradient (as Hugging Face tensors), the logits of packed and padded batches, and the round
trip of the checkpoint. Prints one line per comparison with the largest difference; fails on the
first that is too large.
"""

import os
import sys
from pathlib import Path

from megatron_r1.models import platform

platform.prepare_process()

import grids  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from safetensors.torch import load_file  # noqa: E402

from megatron_r1 import models  # noqa: E402
from megatron_r1.config import Config, ParallelConfig  # noqa: E402
from megatron_r1.models import weights  # noqa: E402
from megatron_r1.models.context_parallel import gathered_order, positions_of_rank  # noqa: E402
from megatron_r1.models.hf_config_names import resolve_aliases  # noqa: E402
from megatron_r1.trainer import distributed  # noqa: E402

# fp32 and another order of sums; logits have a standard deviation of 1. transformers itself is up
# to 1.9e-5 from its fp64 (drawn gpt-oss models, a CPU with AVX2 alone), and so may the trainer be.
LOGIT_TOLERANCE = 4e-5
LOSS_TOLERANCE = 2e-6
# Of each gradient's largest element.
GRADIENT_TOLERANCE = 5e-5


def pack(sequences):
    """Sequences (1, n) end to end, each filled up for context parallelism, all by a last sequence
    for sequence parallelism; fillings have no targets. This context rank's part."""
    rank, ranks = context_place()
    each = 2 * ranks if ranks > 1 else 1
    lengths = [ids.shape[1] for ids in sequences]
    wide = [torch.nn.functional.pad(ids, (0, -ids.shape[1] % each)) for ids in sequences]
    filler = -sum(ids.shape[1] for ids in wide) % 8
    wide = [*wide, *([torch.zeros(1, filler, dtype=torch.long)] if filler else [])]
    bounds = torch.tensor([0, *(ids.shape[1] for ids in wide)]).cumsum(0)
    ids = torch.cat(wide, 1)
    mask = torch.zeros(ids.shape)
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        mask[0, start : start + length - 1] = 1
    positions = torch.cat([torch.arange(part.shape[1]) for part in wide])[None]
    held = positions_of_rank(bounds, rank, ranks)
    longest = int(bounds.diff().max())
    return {
        "input_ids": ids[:, held],
        "position_ids": positions[:, held],
        "labels": ids.roll(-1, 1)[:, held],
        "loss_mask": mask[:, held],
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds.int(),
            cu_seqlens_kv=bounds.int(),
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    }


def context_place():
    return (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )


def unpack(logits, sequences):
    """This context rank's (T, V) of pack(sequences), of all ranks and without fillings."""
    group, ranks = parallel_state.get_context_parallel_group(), context_place()[1]
    bounds = pack(sequences)["packed_seq_params"].cu_seqlens_q.long()
    parts = [torch.empty_like(logits) for _ in range(ranks)]
    dist.all_gather(parts, logits.contiguous(), group=group)
    whole = torch.cat(parts)[gathered_order(bounds, ranks)]
    pairs = zip(bounds.tolist(), sequences, strict=False)
    return torch.cat([whole[start : start + ids.shape[1]] for start, ids in pairs])


def packed_step(batches, model):
    batch = next(batches)
    hidden = model(attention_mask=None, **batch)

    def loss_function(hidden):
        logits = models.compute_logits(model, hidden)
        # Before the cross entropy, which works in place.
        whole = gather_from_tensor_model_parallel_region(logits.detach().clone())[0]
        losses = vocab_parallel_cross_entropy(logits, batch["labels"]) * batch["loss_mask"]
        return losses.sum(), batch["loss_mask"].sum().int(), {"loss": losses.sum(), "logits": whole}

    return hidden, loss_function


def padded_step(batches, model):
    ids = next(batches)
    # A multiple of every tensor-parallel size, as sequence parallelism requires; behind the real
    # tokens.
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % 4))
    positions = torch.arange(ids.shape[1])[None]
    hidden = model(ids, positions, None)

    def loss_function(hidden):
        whole = gather_from_tensor_model_parallel_region(models.compute_logits(model, hidden))[0]
        return whole.sum(), torch.tensor(1), {"logits": whole}

    return hidden, loss_function


def run(step, chunks, batches, forward_only):
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=256,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def report(name, grid, what, difference, tolerance):
    worst = torch.tensor(float(difference))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"{name} {grid} {what}: {worst.item():.1e}", flush=True)
    assert worst <= tolerance, (
        f"{name} at {grid}: {what} differs by {worst.item():.1e} > {tolerance}"
    )


def build(hf_config, sizes):
    """This rank's chunks in Megatron's DDP, and their configuration."""
    parallel = {
        "tensor": sizes["tp"],
        "pipeline": sizes["pp"],
        "expert": sizes["ep"],
        "expert_tensor": sizes["etp"],
        "context": sizes["cp"],
        "sequence": sizes["sequence"],
        "virtual_pipeline": sizes["vp"],
        "pipeline_layout": sizes["layout"],
    }
    recipe = Config(model={"dtype": "float32"}, parallel=parallel)
    config = models.transformer_config(hf_config, recipe)
    config.finalize_model_grads_func = finalize_model_grads
    num_chunks = config.virtual_pipeline_model_parallel_size
    stages = range(num_chunks) if num_chunks else [None]
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    return [
        DistributedDataParallel(config, ddp, models.build_model(hf_config, config, vp_stage=stage))
        for stage in stages
    ]


def compare(name, hf_config, grid, sizes, oracle, out):
    """All comparisons of one model at one grid."""
    model_folder, sequences = oracle / name, torch.load(oracle / "sequences.pt")
    answers = torch.load(model_folder / "answers.pt")
    chunks = build(hf_config, sizes)
    weights.load_hf(chunks, hf_config, model_folder)
    same_checkpoint(name, hf_config, grid, chunks, model_folder, out)
    # The same four packed batches for every number of data-parallel ranks that share them.
    groups = [sequences[0:1], sequences[1:2], sequences[2:5], sequences[5:6]]
    ranks = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    mine = range(rank * len(groups) // ranks, (rank + 1) * len(groups) // ranks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    results = run(packed_step, chunks, [pack(groups[i]) for i in mine], forward_only=False)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        difference = 0.0
        for index, result in zip(mine, results, strict=True):
            start = sum(len(group) for group in groups[:index])
            expected = torch.cat(answers["logits"][start : start + len(groups[index])])
            got = unpack(result["logits"], groups[index])[:, : hf_config["vocab_size"]]
            difference = max(difference, (got - expected).abs().max())
        loss = torch.stack([sum(result["loss"] for result in results)])
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(loss, group=group)
        num_targets = sum(ids.shape[1] - 1 for ids in sequences)
        loss_difference = abs(loss.item() / num_targets - answers["loss"])
    else:
        difference = loss_difference = 0.0
    report(name, grid, "packed logits", difference, LOGIT_TOLERANCE)
    report(name, grid, "loss", loss_difference, LOSS_TOLERANCE * 3)
    same_gradients(name, hf_config, grid, chunks, model_folder, out)

    if sizes["cp"] > 1:
        return  # packed batches only
    results = run(padded_step, chunks, sequences, forward_only=True)
    difference = max(
        (
            (result["logits"][: len(expected), : hf_config["vocab_size"]] - expected).abs().max()
            for result, expected in zip(results, answers["logits"], strict=False)
        ),
        default=0.0,
    )
    report(name, grid, "padded logits", difference, LOGIT_TOLERANCE)


def same_checkpoint(name, hf_config, grid, chunks, model_folder, out):
    """Megatron → one file, and → a folder of several files, equal the checkpoint bit for bit."""
    expected = load_file(model_folder / "model.safetensors")
    weights.write_hf(chunks, hf_config, out / "pushed.safetensors", dtype=torch.float32)
    weights.save_hf(
        chunks, hf_config, model_folder, out / "hf", torch.float32, max_shard_bytes=20_000
    )
    if dist.get_rank() == 0:
        pushed = load_file(out / "pushed.safetensors")
        files = sorted((out / "hf").glob("*.safetensors"))
        assert len(files) > 1, "the export was to be in several files"
        saved = {key: value for file in files for key, value in load_file(file).items()}
        for tensors in (pushed, saved):
            assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
            different = [n for n in expected if not torch.equal(tensors[n], expected[n])]
            assert not different, f"{name} at {grid}: the round trip changed {different}"
        print(f"{name} {grid} round trip: {len(expected)} tensors equal", flush=True)
    dist.barrier()
    # What was exported in several files is a checkpoint itself.
    weights.load_hf(chunks, hf_config, out / "hf")


def same_gradients(name, hf_config, grid, chunks, model_folder, out):
    """Gradients, exported as if they were the weights, equal transformers' gradients."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.grad, kept = None, parameter.data.clone()
                parameter.kept = kept
                parameter.data.copy_(parameter.main_grad)
        weights.write_hf(chunks, hf_config, out / "gradients.safetensors", dtype=torch.float32)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.kept)
    expected = load_file(model_folder / "gradients.safetensors")
    got = load_file(out / "gradients.safetensors")
    assert expected.keys() <= got.keys(), expected.keys() - got.keys()
    worst, where = 0.0, None
    for key, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-4)
        difference = ((got[key] - gradient).abs().max() / scale).item()
        if difference > worst:
            worst, where = difference, key
    report(name, grid, f"{len(expected)} gradients ({where})", worst, GRADIENT_TOLERANCE)


def main(oracle: Path, out: Path, chosen: str, names: list[str]) -> None:
    joined = None
    for grid in names:
        for name, hf_config in grids.models_on(grid, int(os.environ["WORLD_SIZE"]), chosen).items():
            hf_config = resolve_aliases(hf_config)
            with_mtp = bool(hf_config.get("num_nextn_predict_layers"))
            sizes = grids.sizes(grid, with_mtp)
            settings = grids.parallel_settings(grid, with_mtp)
            # Once for models of the same grid: each of Megatron's groups has threads until the end.
            if settings != joined:
                if joined is not None:
                    parallel_state.destroy_model_parallel()
                distributed.initialize(ParallelConfig.model_validate(settings), seed=1)
                joined = settings
            compare(name, hf_config, grid, sizes, oracle, out)
    distributed.leave_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
