"""The primitives as Triton kernels. Deterministic: no atomics, and every sum has one order."""

from r1_kernels.fused import blockwise, policy, segments, softmax

dequantize_blocks, quantize_blocks = blockwise.dequantize_blocks, blockwise.quantize_blocks
logits_gradient, row_statistics = softmax.logits_gradient, softmax.row_statistics
policy_terms, segment_sums = policy.policy_terms, segments.segment_sums
