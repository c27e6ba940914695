"""The part of megatron-r1 that runs inside vLLM.

- Start: vLLM calls `register` (`registration`) in every one of its processes (entry point group
  `vllm.general_plugins`). `serve` is its API server, `argument_check` the parser of its arguments.
- Pushes: `backend` is the weight-transfer backend, `weight_swap` the one call of a swap.
  `loader_copies` records what an engine rank needs, `memory_layout` places it in the receive
  buffer, `layer_reload` loads it, and `load_check` verifies that. `expert_placement` moves copies
  of experts, `pushed_adapter` serves adapters that are pushed alone.
- Replies: `reply_writer` writes bytes, `output_batching` sends tokens in chunks, `sampling_masks`
  adds the tokens that the sampler kept.
- Patches of vLLM: `patches` for all models, `deepseek_patches` and `drafter_patches` for some,
  `cpu_patches`, `cpu_parallel` and `cpu_routed_experts` for its CPU build.

It imports torch, vllm (with their dependencies), `megatron_r1.base.processes` and `transports`, and
the receiving half of `megatron_r1.push`, nothing else of megatron_r1."""

from megatron_r1.engines.plugin.registration import dump_stacks_on_signal, register
