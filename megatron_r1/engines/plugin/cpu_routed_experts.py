"""Returns the routed experts of each token from the model runner of vLLM 0.32's CPU build.

Upstream: config/vllm.py: `VllmConfig._verify_aux_output_compatibility`. Without it:
--enable-return-routed-experts is refused, since it is connected to the second model runner only,
which needs Triton and so never runs on a CPU. Goes when: upstream supports it.

vLLM's capturer, the scheduler's part and the HTTP response do not depend on the runner: here the
first runner captures, and passes each step's rows to the scheduler. Without prefix caching, which
`EngineSettings` turns off, every row of a sequence passes through the model and none has to be
kept for another sequence.

The patch is made after `cpu_parallel`'s, as it wraps the runner's `load_model` last."""

from typing import Any

import numpy as np
import torch
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput


class RowCollector:
    """The rows (layers, topk) of each request's tokens, from the forward pass to the scheduler."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any) -> None:
        from vllm.model_executor.layers.fused_moe import routed_experts_capturer as upstream

        limit = vllm_config.scheduler_config.max_num_batched_tokens
        self.capturer = upstream.RoutedExpertsCapturer(limit, vllm_config)
        upstream.bind_routed_experts_capturer(model, self.capturer)
        # Of each prompt that is computed in parts: its first position, and the rows so far.
        self._parts: dict[str, tuple[int, np.ndarray]] = {}

    def collect(self, runner: Any, scheduled: Any, sampled: list[list[int]]) -> dict[str, Any]:
        """Return, by request in which a token was sampled, the rows from the position that the
        scheduler asks for.

        Args:
            runner: vLLM's model runner.
            scheduled: the scheduler's output of this step.
            sampled: this step's tokens of each request in the runner's batch, in order."""
        metadata, batch = scheduled.aux_output_connector_metadata, runner.input_batch
        for request in metadata.finished_requests:
            self._parts.pop(request, None)
        num_rows = scheduled.total_num_scheduled_tokens
        captured_rows = self.capturer.snapshot_routing_data(num_rows).numpy()
        outputs, end = {}, 0
        for index, request in enumerate(batch.req_ids):
            begin, end = end, end + scheduled.num_scheduled_tokens[request]
            # Rejected drafts have rows too, after those of the sampled tokens; they are dropped.
            num_drafted = len(scheduled.scheduled_spec_decode_tokens.get(request, ()))
            num_rejected = (
                num_drafted + 1 - len(sampled[index]) if num_drafted and sampled[index] else 0
            )
            position = int(batch.num_computed_tokens_cpu[index])
            rows = captured_rows[begin : end - num_rejected]
            first, earlier_rows = self._parts.pop(request, (position, rows[:0]))
            if first + len(earlier_rows) != position:  # preempted, and computed again
                first, earlier_rows = position, rows[:0]
            rows = np.concatenate([earlier_rows, rows])
            if not sampled[index]:
                self._parts[request] = (first, rows)
                continue
            start = metadata.requests[request]
            assert start >= first, f"rows {start} to {first} of {request} were never captured"
            outputs[request] = AuxRequestOutput(start, rows[start - first :])
        return outputs


def return_routed_experts() -> None:
    """Make --enable-return-routed-experts work with the CPU model runner. On CPU, once."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model, execute_model = CPUModelRunner.load_model, CPUModelRunner.execute_model
    sample_tokens = CPUModelRunner.sample_tokens

    def verify(config: Any) -> None:
        if config.aux_output_config.enabled and not config.model_config.is_moe:
            raise ValueError("--enable-return-routed-experts needs a model with experts")

    def load(self: Any, *args: object, **kwargs: object) -> None:
        load_model(self, *args, **kwargs)
        if self.vllm_config.aux_output_config.enabled:
            self.row_collector = RowCollector(self.model, self.vllm_config)

    def execute(self: Any, scheduler_output: object, *args: object) -> object:
        self.step_scheduled = scheduler_output
        return execute_model(self, scheduler_output, *args)

    def sample(self: Any, *args: object) -> object:
        output = sample_tokens(self, *args)
        if self.row_collector is not None:
            output.aux_output_connector_output = self.row_collector.collect(
                self, self.step_scheduled, output.sampled_token_ids
            )
        return output

    CPUModelRunner.row_collector = None
    VllmConfig._verify_aux_output_compatibility = verify
    CPUModelRunner.load_model, CPUModelRunner.execute_model = load, execute
    CPUModelRunner.sample_tokens = sample
