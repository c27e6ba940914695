"""Settings of `rl` that correct the training of any algorithm: one module each, whose docstring is
its definition, with its source.

They change what an algorithm is given, not the algorithm: which responses and tokens have a policy
gradient, an estimate in the loss. Each has a default that changes no bit.

Trainer ranks get their functions as "module:function", as they get an algorithm's. One that needs
the present policy's log-probabilities is a loss around the algorithm's (`wrap_loss`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.config.loss_settings import LossSettings

if TYPE_CHECKING:
    from megatron_r1.trainer.batch import PackedMicrobatch
    from megatron_r1.trainer.loss_head import LossHead
    from megatron_r1.trainer.losses import LossSum

MASK_FUNCTIONS = {
    method: f"{__name__}.engine_mask:{method}_mask" for method in ("token", "sequence")
}
"""By `rl.engine_mask`, the "module:function" of a `trainer.rollout_batches.EngineMaskFunction`,
which compares the engine with π_old."""


def wrap_loss(loss: str, settings: LossSettings) -> tuple[str, LossSettings]:
    """Return the loss that a trainer rank calls, and its settings; both as they are where no
    correction is a loss.

    Args:
        loss: "module:function" of the algorithm's loss.
        settings: the settings of that loss."""
    names = []
    if settings.engine_mask.method == "divergence":
        names.append(f"{__name__}.engine_mask:divergence_loss")
    if settings.kl_estimator == "unbiased":
        if settings.kl_beta > 0:
            names.append(f"{__name__}.unbiased_kl:loss")
        else:  # nothing is estimated, and r1_kernels does not know the name
            settings = replace(settings, kl_estimator="k3")
    if not names:
        return loss, settings
    return names[0], replace(settings, inner=(*names[1:], loss))


def call_inner_loss(batch: PackedMicrobatch, head: LossHead, settings: LossSettings) -> LossSum:
    """Return the result of the first loss of `settings.inner`.

    Args:
        batch: the packed samples.
        head: the model's output layer.
        settings: the settings of the loss that calls it."""
    from megatron_r1.base.user_code import find_function

    name, *inner_losses = settings.inner
    settings = replace(settings, inner=tuple(inner_losses))
    loss_sum: LossSum = find_function(name)(batch, head, settings)
    return loss_sum
