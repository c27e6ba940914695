"""The part of megatron-r1 that runs inside vLLM.

It imports torch, vllm (with their dependencies), `megatron_r1.base.processes` and `transports`, and
the receiving half of `megatron_r1.push`, nothing else of megatron_r1. vLLM calls `register` in
every one of its processes (entry point group `vllm.general_plugins`)."""

from megatron_r1.engines.plugin.registration import dump_stacks_on_signal, register
