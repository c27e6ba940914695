"""The calls of `first_steps` with Transformer Engine's modules on null GPUs, as JSON lines:
`first_steps_on_null_gpu.py MODEL GRID ATTENTION_BACKEND` under torchrun."""

import json
import sys

import trainer_on_null_gpu

from megatron_r1.config import Config


def main() -> None:
    model, grid, backend = sys.argv[1:]
    trainer_on_null_gpu.compute_on_host(our_attention=False)
    import trainer_steps
    from torch import distributed as dist

    from megatron_r1.trainer import distributed, first_steps
    from megatron_r1.trainer.trainer import Trainer

    given = trainer_steps.config(model, grid).model_dump()
    given["parallel"]["tokens_per_microbatch"] = 3000
    given["rollout"]["max_response_tokens"] = 2000
    given["model"]["attention_backend"] = backend
    settings = Config.model_validate(given)
    trainer = Trainer(settings, distributed.initialize(settings.parallel, seed=0))
    calls = []

    def note(core, inputs, keywords) -> None:
        shapes = [list(tensor.shape) for tensor in inputs[:3]]
        borders = keywords["packed_seq_params"].cu_seqlens_q
        calls.append([core.training, shapes, len(borders) - 1, int(borders[-1])])

    for chunk in trainer.model_chunks:
        for module in chunk.modules():
            if core := getattr(module, "core_attention", None):
                core.register_forward_pre_hook(note, with_kwargs=True)
    first_steps.call_kernels(trainer)
    for chunk in trainer.ddp_chunks:
        chunk.zero_grad_buffer()  # refuses gradients that hooks have counted
    unchanged = not any(bool(b.grad_data.any()) for c in trainer.ddp_chunks for b in c.buffers)
    print(json.dumps({"rank": dist.get_rank(), "calls": calls, "unchanged": unchanged}), flush=True)
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
