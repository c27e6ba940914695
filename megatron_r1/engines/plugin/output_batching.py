"""Sends tokens from an engine's core to its server in chunks, where whole responses are wanted.

vLLM sends a message for every step, in which each sequence's token and log-probability are objects
of their own. The thread that encodes them takes the interpreter from the one that computes, and the
server decodes each."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_TOKENS = 64
"""Tokens of a sequence after which they are sent all the same."""
OTHER_FIELDS = (
    "finish_reason",
    "new_prompt_logprobs_tensors",
    "pooling_output",
    "events",
    "kv_transfer_params",
    "ec_transfer_params",
    "routed_experts",
)
"""Fields of an output that is sent at once where one is set."""


@dataclass
class _BufferedOutputs:
    """What a sequence has sampled since its last message.

    Attributes:
        client: the server it is for.
        outputs: the outputs of each step."""

    client: int
    outputs: list[Any]

    def merge(self) -> Any:
        """Return one output with the tokens of all; that of the newest is changed and returned."""
        first_output, last_output = self.outputs[0], self.outputs[-1]
        if first_output is last_output:
            return first_output
        last_output.new_token_ids = [
            token for output in self.outputs for token in output.new_token_ids
        ]
        parts = [output.new_logprobs for output in self.outputs if output.new_logprobs is not None]
        if parts:
            columns = zip(*(part[:3] for part in parts), strict=True)
            last_output.new_logprobs = type(parts[0])(*map(np.concatenate, columns), None)
        masks = [output.new_sampling_mask for output in self.outputs if output.new_sampling_mask]
        if masks:
            last_output.new_sampling_mask = _concatenate_masks(masks)
        last_output.prefill_stats = first_output.prefill_stats
        return last_output


def _concatenate_masks(masks: list[Any]) -> Any:
    """Return the kept ids of consecutive tokens as one of vLLM's `SamplingMaskLists`."""
    ids = np.concatenate([mask.token_ids for mask in masks])
    # One without offsets is of one token.
    counts = [
        [len(mask.token_ids)] if mask.offsets is None else np.diff(mask.offsets) for mask in masks
    ]
    return type(masks[0])(ids, np.cumsum([0, *np.concatenate(counts)]))


class OutputBuffer:
    """The outputs of unfinished sequences that are kept back."""

    def __init__(self) -> None:
        self._buffered: dict[str, _BufferedOutputs] = {}

    def buffer(self, outputs: dict[int, Any], wants_whole: Callable[[str], bool]) -> dict[int, Any]:
        """Keep back a step's outputs that can wait, and merge them into the next output that
        cannot; return `outputs`.

        Args:
            outputs: the step's `EngineCoreOutputs`, by client; what is then empty is removed.
            wants_whole: whether a request's client reads nothing before its last token."""
        for client, client_outputs in list(outputs.items()):
            sent_outputs = []
            for output in client_outputs.outputs:
                buffered_outputs = self._buffered.get(output.request_id)
                can_wait = _is_plain(output) and wants_whole(output.request_id)
                if buffered_outputs is None and not can_wait:
                    sent_outputs.append(output)
                    continue
                if buffered_outputs is None:
                    buffered_outputs = self._buffered[output.request_id] = _BufferedOutputs(
                        client, []
                    )
                buffered_outputs.outputs.append(output)
                if not can_wait or len(buffered_outputs.outputs) >= MOST_TOKENS:
                    del self._buffered[output.request_id]
                    sent_outputs.append(buffered_outputs.merge())
            client_outputs.outputs = sent_outputs
            other_fields = (
                client_outputs.scheduler_stats,
                client_outputs.finished_requests,
                client_outputs.wave_complete,
            )
            if not sent_outputs and all(value is None for value in other_fields):
                del outputs[client]
        return outputs

    def flush(self) -> dict[int, list[Any]]:
        """Return all that is kept back, by client, and keep it no longer."""
        outputs: dict[int, list[Any]] = {}
        for buffered_outputs in self._buffered.values():
            outputs.setdefault(buffered_outputs.client, []).append(buffered_outputs.merge())
        self._buffered.clear()
        return outputs

    def discard(self, request_ids: Collection[str]) -> None:
        """Drop what was sampled for aborted requests."""
        for request_id in request_ids:
            self._buffered.pop(request_id, None)


def _is_plain(output: Any) -> bool:
    return all(getattr(output, name) is None for name in OTHER_FIELDS)


def patch_output_batching() -> None:
    """Have engine cores keep outputs back, where vLLM's statistics, which count each step's tokens,
    are off.

    Upstream: v1/engine/core.py: `EngineCore._attach_weight_version` and
    `EngineCoreProc.pause_scheduler`. The first is called with the outputs of every step. Before a
    pause all is sent, as weights change in pauses only and a message has one version. Without it: a
    message for every step. Goes when: a server can ask its core for whole responses."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    attach, pause = EngineCore._attach_weight_version, EngineCoreProc.pause_scheduler
    abort = EngineCore.abort_requests

    def find_buffer(core: Any) -> OutputBuffer:
        if not hasattr(core, "output_buffer"):
            core.output_buffer = OutputBuffer()
        return core.output_buffer

    def attach_weight_version(self: Any, outputs: dict[int, Any]) -> None:
        attach(self, outputs)
        if self.log_stats:
            return
        requests = self.scheduler.requests

        def wants_whole(request_id: str) -> bool:
            request = requests.get(request_id)
            sampling = request.sampling_params if request is not None else None
            # Stop strings are found by the server, in the text so far.
            return bool(
                sampling
                and sampling.output_kind == RequestOutputKind.FINAL_ONLY
                and not sampling.detokenize
            )

        find_buffer(self).buffer(outputs, wants_whole)

    def pause_scheduler(self: Any, *args: Any, **kwargs: Any) -> Any:
        for client, outputs in find_buffer(self).flush().items():
            message = EngineCoreOutputs(outputs=outputs, weight_version=self._weight_version)
            self.output_queue.put_nowait((client, message))
        return pause(self, *args, **kwargs)

    def abort_requests(self: Any, request_ids: list[str]) -> None:
        find_buffer(self).discard(request_ids)
        abort(self, request_ids)

    EngineCore._attach_weight_version = attach_weight_version
    EngineCoreProc.pause_scheduler = pause_scheduler
    EngineCore.abort_requests = abort_requests
