"""Compares what Megatron's attention hands to Transformer Engine's choice of a backend with what
`attention_parameters` says: `attention_handed_over.py MODEL GRID SHARE_PROMPTS`, under torchrun."""

import sys

from trainer_on_null_gpu import accumulating, compute_on_host

from megatron_r1.models.attention_choice import attention_parameters
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

SIZES = ("batch_size", "num_tokens_q", "num_tokens_kv")
"""They are those of the micro-batch."""


class HandedOver(Exception):
    """Its argument is what was handed over."""


def hand_over(parameters):
    raise HandedOver(parameters)


def handed_over_by(call, *arguments):
    try:
        call(*arguments)
    except HandedOver as error:
        return error.args[0]
    raise AssertionError("the attention is not Transformer Engine's")


def main() -> None:
    model, grid, shares = sys.argv[1:]
    compute_on_host(our_attention=False)
    import trainer_steps

    settings = accumulating(trainer_steps.config)(model, grid).with_changes(
        model={"dtype": "bfloat16", "init": "random"},
        parallel={"tokens_per_microbatch": 1000, "share_prompts": shares == "shared"},
    )
    position = distributed.initialize(settings.parallel, seed=0)
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(settings, position)
    prompt = [1, 2, 3, 4, 5]
    samples = [
        Sample.pack(prompt, [7] * length, [-1.0] * length, 1.0 - 2 * (length % 2))
        for length in (19, 30, 30, 18)
    ]
    trainer.load([[samples]])
    longest = max(map(len, samples))
    expected = attention_parameters(settings, trainer.transformer_config, longest)
    choose, utils.get_attention_backend = utils.get_attention_backend, hand_over
    handed_over = [
        handed_over_by(trainer.compute_logprobs, 1.0, False),
        handed_over_by(trainer_steps.update, trainer, 0),
    ]
    utils.get_attention_backend = choose
    assert [parameters.is_training for parameters in handed_over] == [False, True]
    for parameters in handed_over:
        sizes = {name: getattr(parameters, name) for name in SIZES}
        same = [utils.AttentionParams(**each | sizes) for each in expected]
        assert parameters in same, f"{parameters}\nis not among\n{same}"
        mask = "padding_causal" + "_bottom_right" * settings.parallel.share_prompts
        assert parameters.attn_mask_type == mask, parameters
    if position.rank == 0:
        print(f"{grid} {shares}: as handed over, {trainer.attention}")


if __name__ == "__main__":
    main()
