"""What a trainer on the null GPU gives back of it between its phases, and what it has afterwards:
`offload_on_null_gpu.py MODEL DTYPE MOMENTS PLACE`.

Prints the bytes that torch has less, those that `Offload` says, and those that the plan counts. The
values that come back must be equal, bit for bit."""

import os
import sys

import torch
from checkpoint_round_trip import attention_without_cudnn, state
from host_compute import HostCompute
from trainer_steps import LOSS, SETTINGS, load

from megatron_r1.base.processes import children
from megatron_r1.config import Config
from megatron_r1.models import read_hf_config
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.offload import offloaded_bytes
from megatron_r1.trainer import distributed
from megatron_r1.trainer.passes import free_gradients


def main() -> None:
    model, dtype, moments, place = sys.argv[1:]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(children.free_port())
    settings = Config.model_validate(
        {
            "model": {"path": model, "dtype": dtype},
            "rollout": {"colocated": True},
            "optimizer": {"learning_rate": 0.1, "moments": moments},
            "parallel": {
                **{"tokens_per_microbatch": 256, "threads": 1},
                "offload_between_phases": place,
            },
        }
    )
    grid_position = distributed.initialize(settings.parallel, seed=0)
    from megatron_r1.trainer.trainer import Trainer

    attention_without_cudnn()
    with HostCompute():
        trainer = Trainer(settings, grid_position)
        trainer.refresh_reference()
        load(trainer, grid_position, (1,), first_old=False)
        trainer.update(0, LOSS, SETTINGS, 0.1)
        values = state(trainer)
        torch.manual_seed(1)
        for tensor in values.values():
            tensor.copy_(torch.randn(tensor.shape))
        expected = {name: tensor.clone() for name, tensor in values.items()}
        trainer.rollout.clear()
        free_gradients(trainer.ddp_chunks)
        before = torch.cuda.memory_allocated()
        trainer.free_memory(free_parameters=True)
        less, away = before - torch.cuda.memory_allocated(), trainer.offload.offloaded_bytes
        trainer.offload.restore("parameters", "optimizer")
        assert before == torch.cuda.memory_allocated()
    found = state(trainer)
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert found.keys() == expected.keys() and not different, different[:5]
    hf_config = read_hf_config(model)
    job = PlannedJob(hf_config, settings, 1, HARDWARE["H100"])
    planned = offloaded_bytes(job, RankCounts(job).rank_counts(0))
    distributed.leave_process_groups()
    print(f"\nbytes: {less} {away} {planned}")


if __name__ == "__main__":
    main()
