"""The head's weight gradient in Megatron's gradient buffers: `head_gradients.py FOLDER GRID…`.

After an update of the real trainer, with a supervised loss (MTP layers trained), a policy loss, and
a loss of a user's that reads the head's weight itself: in fp32 every gradient is the one without
`fp32_main_grad`; in bf16 that of a micro-batch is not rounded to bf16. FOLDER has the models. Fails
on the first expectation that does not hold."""

import sys
from unittest.mock import patch

import torch
from grids import parallel_settings, positions
from trainer_options import gradients

from megatron_r1.config import Config, ParallelConfig
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.models import lm_head_weight, policy_model
from megatron_r1.trainer.losses import LossSum, loss_denominator, supervised_loss
from megatron_r1.trainer.training_sample import Sample

GRPO = "megatron_r1.controller.algorithms.grpo:loss"
SUPERVISED = "megatron_r1.trainer.losses:supervised_loss"
OWN = "head_gradients:with_a_penalty"
SETTINGS = LossSettings(loss_average="token", clip_low=0.2, clip_high=0.2)
TIED, UNTIED = "qwen-tied", "deepseek-yarn-mtp"


def with_a_penalty(batch, head, settings=None) -> LossSum:
    """A loss of a user's, of which a part does not pass through the kernels."""
    loss, *_ = supervised_loss(batch, head)
    return LossSum(loss + head.weight.float().square().sum(), loss_denominator(batch, "token"), {})


def updated(folder: str, name: str, grid: str, grid_position, loss: str, dtype: str = "float32"):
    """A trainer after an update with two micro-batches, in bf16 with one."""
    from megatron_r1.trainer.trainer import Trainer

    mtp = {"mtp": "train" if name == UNTIED and dtype == "float32" else "none"}
    parallel = {**parallel_settings(grid), "threads": 1}
    model = {"path": f"{folder}/{name}", "dtype": dtype, **mtp}
    optimizer = {"learning_rate": 0.01, "epsilon": 1.0, "clip_grad": 1e9}
    sections = {"model": model, "optimizer": optimizer, "parallel": parallel}
    trainer = Trainer(Config.model_validate(sections), grid_position)
    samples = [Sample.pack([1], list(range(2, n)), [-4.0] * (n - 2), 1.0) for n in (10, 18, 26, 18)]
    microbatches = [samples] if dtype == "bfloat16" else [samples[:2], samples[2:]]
    trainer.load([microbatches])
    trainer.compute_logprobs(1.0, with_reference=False, with_first_minibatch=False)
    trainer.update(0, loss, SETTINGS if loss == GRPO else None, 0.01)
    return trainer


def without_sums():
    from megatron_r1.trainer import output_heads

    none = lambda weight: None  # noqa: E731
    return patch.object(output_heads, "fp32_main_grad", none), patch.object(
        policy_model, "fp32_main_grad", none
    )


def gradients_are_the_same(folder: str, name: str, grid: str, grid_position, loss: str) -> None:
    where = f"{name} {grid} {loss}"
    trainer = updated(folder, name, grid, grid_position, loss)
    got = gradients(trainer)
    if grid_position.is_last_stage:
        weight = lm_head_weight(trainer.model_chunks[-1])
        # What else has a gradient for the same weight: the embedding, the MTP layers, the penalty.
        is_alone = loss == GRPO if name == UNTIED else loss != OWN and grid == "pp2"
        assert weight.grad_added_to_main_grad is is_alone, where
        assert weight.main_grad.abs().max() > 0, where
    first, second = without_sums()
    with first, second:
        expected = gradients(updated(folder, name, grid, grid_position, loss))
    for parameter, gradient in expected.items():
        # fp32 sums in another order.
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            got[parameter], gradient, rtol=0, atol=1e-6 * scale, msg=f"{where} {parameter}"
        )


def a_sum_in_bf16_is_not_rounded(folder: str, grid: str, grid_position, loss: str) -> None:
    def is_rounded(trainer) -> bool:
        gradient = lm_head_weight(trainer.model_chunks[-1]).main_grad
        return torch.equal(gradient, gradient.bfloat16().float())

    trainer = updated(folder, TIED, grid, grid_position, loss, "bfloat16")
    # The sum was divided by the number of tokens, a power of two.
    if grid_position.is_last_stage:
        assert not is_rounded(trainer), f"{grid} {loss}"
    first, second = without_sums()
    with first, second:
        rounded = updated(folder, TIED, grid, grid_position, loss, "bfloat16")
    if grid_position.is_last_stage:
        assert is_rounded(rounded), f"{grid} {loss}: this test would find nothing"


def main() -> None:
    folder, *names = sys.argv[1:]

    def parallel(grid: str) -> ParallelConfig:
        return ParallelConfig.model_validate({**parallel_settings(grid), "threads": 1})

    for grid, grid_position in positions(names, parallel):
        cases = (TIED, SUPERVISED), (TIED, OWN), (UNTIED, SUPERVISED), (UNTIED, GRPO)
        for name, loss in cases:
            gradients_are_the_same(folder, name, grid, grid_position, loss)
        # Elsewhere the sum over ranks follows, of replicas or of a tied embedding.
        for loss in (SUPERVISED, GRPO) if grid in ("one", "tp2") else ():
            a_sum_in_bf16_is_not_rounded(folder, grid, grid_position, loss)


if __name__ == "__main__":
    main()
