"""An update with the experts' exchange behind computation, and one without: `exchange_steps.py
FOLDER GRID…`, FOLDER/NAME/config.json the models of CASES.

Compares metrics, every gradient, the router's bias and every weight after the update. In fp32,
which recipes refuse, differences are those of rounding alone: a trainer of this script is switched
after it was built. In bf16 it is the recipe's key. Fails on the first expectation that does not
hold."""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from grids import parallel_settings

from megatron_r1.config import Config
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

POLICY = LossSettings(
    loss_average="token", clip_low=0.2, clip_high=0.3, kl_beta=0.1, entropy_coef=0.01
)
GRPO = "megatron_r1.controller.algorithms.grpo:loss"
SUPERVISED = "megatron_r1.trainer.losses:supervised_loss"
SELECTIVE = ["layernorm", "mla_up_proj", "mlp", "shared_experts"]
TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-3}
"""Of a tensor's largest element. The parts sum the gradients of a tensor with several uses in
another order: bits are lost in the model's dtype."""

# Of each: the model and the recipe's changes.
CASES = {
    "plain": ("deepseek", {}),
    "mtp": ("deepseek-mtp", {"model.mtp": "train", "model.expert_bias_update_rate": 0.01}),
    "selective": (
        "deepseek",
        {"parallel.recompute": "selective", "parallel.recompute_modules": SELECTIVE},
    ),
    "core_attn": ("deepseek", {"parallel.recompute": "selective"}),
    "replay": ("deepseek", {"rl.routing_replay": True}),
    "prompts": ("deepseek", {"parallel.share_prompts": True}),
    "lora": ("deepseek", {"model.lora": {"rank": 4}, "model.init": "load"}),
    "fp8": ("even-sizes", {"fp8.recipe": "blockwise"}),
    "one-expert": ("one-expert", {}),
    "dense-end": ("dense-end", {}),
    "score": ("deepseek", {"model.head": "score"}),
    "bf16": ("deepseek", {"model.dtype": "bfloat16"}),
}


def config(model: Path, grid: str, changes: dict, dtype: str, overlap: bool = False) -> Config:
    sections: dict = {
        "model": {"path": str(model), "dtype": dtype, "init": "random", "mtp": "none"},
        # No clipping: it would hide a gradient that is wrong by a factor.
        "optimizer": {"learning_rate": 0.1, "epsilon": 1.0, "clip_grad": 1e9},
        "parallel": {**parallel_settings(grid), "tokens_per_microbatch": 80, "threads": 1},
        "rl": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    with_mtp = sections["model"]["mtp"] != "none"
    sections["parallel"] |= {
        "pipeline_layout": parallel_settings(grid, with_mtp)["pipeline_layout"],
        "overlap_expert_exchange": overlap,
    }
    return Config.model_validate(sections)


def samples(shape) -> list[Sample]:
    """Twenty samples, of lengths that no grid pads: a router would count the padding."""
    draw = random.Random(3)
    made = []
    for index in range(20):
        prompt = [1 + index // 4, 7, 11, 13]  # four samples have each prompt
        response = [draw.randrange(67) for _ in range(4 + 8 * draw.randrange(1, 8))]
        logprobs = [-draw.uniform(3, 6) for _ in response]
        routing = b""
        if shape is not None:
            rows = len(prompt) + len(response) - 1
            chosen = [
                draw.sample(range(shape.num_experts), shape.topk)
                for _ in range(rows * len(shape.moe_layers))
            ]
            routing = bytes(expert for row in chosen for expert in row)
        made.append(Sample.pack(prompt, response, logprobs, draw.uniform(-2, 2), routing))
    return made


class Parts:
    """Counts the layers of which a forward and a backward pass run in parts together."""

    def __init__(self):
        from megatron.core.models.common.model_chunk_schedule_plan import (
            TransformerLayerSchedulePlan,
        )

        self.together = self.alone = 0
        run = TransformerLayerSchedulePlan.run

        def counted(forward, backward, *args, **kwargs):
            both = forward is not None and backward is not None
            self.together += both
            self.alone += not both
            return run(forward, backward, *args, **kwargs)

        TransformerLayerSchedulePlan.run = staticmethod(counted)


def write_weights(model: Path, grid: str, grid_position) -> None:
    """Write random weights to start from into a model's folder."""
    from megatron_r1.models import weights
    from megatron_r1.trainer.trainer import Trainer

    if not (model / "model.safetensors").exists():
        trainer = Trainer(config(model, grid, {}, "float32"), grid_position)
        file = model / "model.safetensors"
        weights.write_hf(trainer.model_chunks, trainer.hf_config, file, dtype=torch.float32)
    dist.barrier()


def updated(settings: Config, grid_position, *, switched: bool) -> tuple[dict, dict]:
    """Return the metrics and tensors of a trainer after one update."""
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(settings, grid_position)
    if switched:
        trainer.transformer_config.overlap_moe_expert_parallel_comm = True
    shape = routing_shape(trainer.hf_config) if settings.rl.routing_replay else None
    made = samples(shape)
    lengths = [len(sample) for sample in made]
    plan = pack_samples(lengths, grid_position.data_parallel_size, 80).shares[
        grid_position.data_rank
    ]
    trainer.load([[[made[i] for i in members] for members in plan]])
    if settings.model.head == "score":
        report = trainer.update(0, SUPERVISED_SCORE, None, 0.1)
    else:
        trainer.refresh_reference()
        trainer.compute_logprobs(0.8, with_reference=True)
        loss, own = (SUPERVISED, None) if settings.model.mtp == "train" else (GRPO, POLICY)
        report = trainer.update(0, loss, own, 0.1, 0.8)
    tensors = {}
    for index, chunk in enumerate(trainer.model_chunks):
        for name, parameter in chunk.named_parameters():
            tensors[f"weight {index} {name}"] = parameter.detach().clone()
            if parameter.requires_grad:
                tensors[f"gradient {index} {name}"] = parameter.main_grad.clone()
        for name, buffer in chunk.named_buffers():
            tensors[f"buffer {index} {name}"] = buffer.clone()
    return report, tensors


SUPERVISED_SCORE = "exchange_steps:score_loss"


def score_loss(batch, scores, settings):
    """A loss of every token's score, as a critic has."""
    values = scores.token_scores[batch.response_positions]
    loss = (values - batch.rollout_logprobs[batch.response_positions]).square().sum()
    count = torch.tensor(len(batch.response_positions), dtype=torch.int, device=values.device)
    return loss, count, {}


def compare(folder: Path, grid: str, case: str, grid_position, parts: Parts) -> None:
    model, changes = CASES[case]
    dtype = changes.get("model.dtype", "float32")
    if "model.lora" in changes:
        write_weights(folder / model, grid, grid_position)
    plain = config(folder / model, grid, changes, dtype)
    expected, tensors = updated(plain, grid_position, switched=False)
    assert parts.together == parts.alone == 0, "without the key passes run whole"
    key = dtype == "bfloat16"
    settings = config(folder / model, grid, changes, dtype, overlap=True) if key else plain
    got, others = updated(settings, grid_position, switched=not key)
    assert parts.together, f"{grid} {case}: no layer ran in parts"
    parts.together = parts.alone = 0
    for name, value in expected.items():
        gap = abs(got[name] - value)
        assert gap <= TOLERANCE[dtype] * max(1.0, abs(value)), f"{grid} {case} {name}: {gap}"
    worst, moved = 0.0, False
    for name, tensor in tensors.items():
        scale = tensor.abs().max().item() or 1.0
        moved |= name.startswith("gradient") and bool(tensor.any())
        gap = (others[name].double() - tensor.double()).abs().max().item() / scale
        worst = max(worst, gap)
        assert gap <= TOLERANCE[dtype], f"{grid} {case} {name}: {gap:.3g} of its largest element"
    assert moved, f"{grid} {case}: no gradient"
    largest = torch.tensor(worst)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if grid_position.rank == 0:
        print(f"{grid} {case} holds, {largest:.2g}", flush=True)


def main() -> None:
    folder, *grids = sys.argv[1:]
    parts = None
    for grid in grids:
        grid, _, chosen = grid.partition("+")
        first = config(Path(folder) / "deepseek-mtp", grid, {"model.mtp": "train"}, "float32")
        grid_position = distributed.initialize(first.parallel, seed=0)
        from megatron.core import parallel_state

        parts = parts or Parts()
        for case in chosen.split(",") if chosen else CASES:
            compare(Path(folder), grid, case, grid_position, parts)
            dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
