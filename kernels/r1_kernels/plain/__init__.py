"""The primitives in plain PyTorch, fast enough to train with on a CPU."""

from r1_kernels.plain import blockwise, policy, softmax

dequantize_blocks, quantize_blocks = blockwise.dequantize_blocks, blockwise.quantize_blocks
logits_gradient, row_statistics = softmax.logits_gradient, softmax.row_statistics
policy_terms, segment_sums = policy.policy_terms, policy.segment_sums
