"""Apple's cut-cross-entropy 25.1.1, Megatron-Core 0.16.1 and TRL 1.16."""

from __future__ import annotations

from tools.bench.kernels.calls import hidden_passes, logits_passes

VOCAB_CHUNK = 32_768  # what TRL's trainers pass


def _cce(exact: bool):
    """Per-token losses without logits in memory. Its default leaves out blocks of small gradients;
    exact: it computes them all."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"reduction": "none", "impl": "cce"} | ({"filter_eps": None} if exact else {})
    return lambda *inputs: (-linear_cross_entropy(*inputs, **options),)


CCE_EXACT = hidden_passes(
    "cut-cross-entropy, exact", lambda: _cce(exact=True), "no entropy", gpu_only=True
)
CCE = hidden_passes(
    "cut-cross-entropy",
    lambda: _cce(exact=False),
    "drops small gradients; no entropy",
    gpu_only=True,
)
# Without gradients there are none to drop.
CCE_FORWARD = hidden_passes(
    "cut-cross-entropy", lambda: _cce(exact=True), "no entropy", gpu_only=True
).forward


def _megatron():
    """The vocabulary-parallel cross entropy that Megatron-Core fuses, on a group of one."""
    import torch
    import torch.distributed as dist
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def logprobs(logits, targets):
        # Its shape is (sequence, batch, vocabulary).
        losses = fused_vocab_parallel_cross_entropy(
            logits[:, None], targets[:, None], dist.group.WORLD
        )
        return (-losses[:, 0],)

    return logprobs


# It exponentiates fp32 logits in place.
MEGATRON = logits_passes(
    "Megatron-Core fused", _megatron, "no entropy", "gradient in bfloat16", overwrites=True
)


def _trl_chunked():
    from trl.kernels import ChunkedLogProbFunction

    # After the targets: temperature, chunk, soft cap, scale of the logits, further results.
    settings = 1.0, VOCAB_CHUNK, None, 1.0, ("entropy",)
    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, *settings
    )


def _trl_logits():
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


TRL_CHUNKED = hidden_passes("TRL chunked", _trl_chunked)
TRL_LOGITS = logits_passes("TRL log_softmax_and_entropy", _trl_logits, gpu_only=True)
