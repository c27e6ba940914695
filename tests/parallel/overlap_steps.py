"""The policy's parameters after three mini-batches, gathered in the background and not:
`overlap_steps.py MODEL`, on data-parallel ranks.

Also: that they are the same where the gradients' memory is freed between steps, what is reported to
be in use, and that a model with fused gradients is built without Apex. Fails on the first
expectation that does not hold."""

import random
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_r1 import models
from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"


def parameters(
    model: str, grid_position, overlap: bool, *, yields: bool = False
) -> tuple[dict[str, torch.Tensor], dict]:
    from megatron_r1.trainer import implementations
    from megatron_r1.trainer.trainer import Trainer

    parallel = {"threads": 1, "overlap_param_gather": overlap}
    config = {"model": {"path": model, "dtype": "float32"}, "parallel": parallel}
    trainer = Trainer(
        Config.model_validate(config | {"optimizer": {"epsilon": 1.0}}), grid_position
    )
    draw = random.Random(5)
    minibatches = []
    for _ in range(3):
        made = [Sample.pack([1], [draw.randrange(67) for _ in range(15)]) for _ in range(4)]
        shares = pack_samples([16] * 4, grid_position.data_parallel_size, 32).shares
        minibatches.append([[made[i] for i in part] for part in shares[grid_position.data_rank]])
    trainer.load(minibatches)
    for index in range(3):
        if yields:
            trainer.free_memory()
            buffers = [b for c in trainer.ddp_chunks for b in c.buffers + c.expert_parallel_buffers]
            assert [b.grad_data.untyped_storage().nbytes() for b in buffers] == [0] * len(buffers)
            trainer.load(minibatches)  # it has freed the samples, too
        trainer.update(index, LOSS, None, 0.01)
    return {n: p.detach().clone() for n, p in trainer.model_chunks[0].named_parameters()}, (
        implementations.describe_implementations(trainer)
    )


def main() -> None:
    (model,) = sys.argv[1:]
    config = Config.model_validate({"model": {"path": model, "dtype": "float32"}})
    grid_position = distributed.initialize(config.parallel, seed=0)
    expected, plain = parameters(model, grid_position, False)
    got, overlapped = parameters(model, grid_position, True)
    freed, _ = parameters(model, grid_position, True, yields=True)
    for name, tensor in expected.items():
        assert torch.equal(freed[name], tensor), name
        assert torch.equal(got[name], tensor), f"{name}: {(got[name] - tensor).abs().max()}"
        ranks = [torch.empty_like(tensor) for _ in range(grid_position.world_size)]
        dist.all_gather(ranks, got[name])
        assert all(torch.equal(each, ranks[0]) for each in ranks), f"{name} differs between ranks"
    assert plain == {
        "norm": "RMSNorm (ours)",
        "linear layers": (
            "ColumnParallelLinear (Megatron-Core), ExpertOutput (ours), "
            "ReplicatedLinear (ours), RowParallelLinear (Megatron-Core)"
        ),
        "attention": "CoreAttention (ours)",
        "dispatcher": "MoEAlltoAllTokenDispatcher (Megatron-Core)",
        "experts": "SequentialMLP (Megatron-Core)",
        "fusions": "none",
        "optimizer": "AdamW (torch) in DistributedOptimizer",
        "gradient reduction": "gloo in the parameters' dtype, nothing overlapped",
        "loss head": "r1_kernels, in PyTorch",
    }, plain
    reduction = "gloo in the parameters' dtype, reduction and gather of parameters overlapped"
    assert overlapped == plain | {"gradient reduction": reduction}, overlapped
    hf_config = models.read_hf_config(model)
    fused = replace(models.transformer_config(hf_config, config), gradient_accumulation_fusion=True)
    models.build_model(hf_config, fused, grid_position.groups)
    distributed.leave_process_groups()
    print("holds", flush=True)


if __name__ == "__main__":
    main()
