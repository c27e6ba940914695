"""Supervised steps of the real trainer: `reported_steps.py MODEL OUT MTP STEPS GRID…`.

The only example is the model's first token sequence, all but its first token a response. Writes for
each grid OUT/GRID-before.safetensors, the weights as they were read; OUT/GRID, the exported folder
after STEPS steps; and OUT/GRID.pt: the trainer's log-probabilities of the response then, and the
losses of all steps, of the model and of its MTP layers."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from grids import parallel_settings

from megatron_r1.config import Config
from megatron_r1.models import weights
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"


def main() -> None:
    model, out, mtp, steps, *grids = sys.argv[1:]
    first, *rest = torch.load(Path(model).parent / "sequences.pt")[0][0].tolist()
    if mtp == "train":  # eight distinct tokens that are easily learned by heart
        first, *rest = torch.tensor([first, *rest]).unique()[:8].tolist()
    for grid in grids:
        parallel = {**parallel_settings(grid, mtp != "none"), "threads": 1}
        config = Config.model_validate(
            {
                "model": {"path": model, "dtype": "float32", "mtp": mtp},
                "optimizer": {"learning_rate": 0.01, "weight_decay": 0.0},
                "parallel": parallel,
            }
        )
        grid_position = distributed.initialize(config.parallel, seed=0)
        from megatron.core import parallel_state

        from megatron_r1.trainer.operations import SUPERVISED
        from megatron_r1.trainer.trainer import Trainer

        trainer, file = Trainer(config, grid_position), Path(out) / grid
        before = file.with_name(f"{grid}-before.safetensors")
        weights.write_hf(trainer.model_chunks, trainer.hf_config, before, dtype=torch.float32)
        sample = Sample.pack([first], rest, [-1.0] * len(rest), 1.0)
        reports = []
        for _ in range(int(steps)):
            trainer.load([[[sample]]])
            reports.append(trainer.update(0, SUPERVISED, None, 0.01))
        trainer.load([[[sample]]])
        trainer.compute_logprobs(1.0, with_reference=False)
        weights.save_hf(trainer.model_chunks, trainer.hf_config, model, file, torch.float32)
        if (
            grid_position.is_last_stage
            and grid_position.data_rank == grid_position.tensor_rank == 0
        ):
            (batch,) = trainer.rollout.minibatches[0]
            logprobs = batch.logprobs["old"][batch.is_response]
            content = {"ids": [first, *rest], "logprobs": logprobs, "reports": reports}
            torch.save(content, file.with_suffix(".pt"))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
