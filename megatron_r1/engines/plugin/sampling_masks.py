"""The tokens that the sampler kept, with each response (`--return-sampling-mask`).

vLLM 0.32 has this in its second model runner, which does not run on a CPU. The first runner's
sampler computes the log-probabilities after top-k and top-p, which are -inf for others. What they
leave is collected here and goes through vLLM's own scheduler and output processor."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplingMaskLists


class SamplingMaskCollector:
    """What the sampler kept in the step under way.

    Attributes:
        logprobs: (rows, V) after top-k and top-p, one row per request, or with drafts as many for
            each as it may sample; None before the sampler ran."""

    def __init__(self) -> None:
        self.logprobs: Tensor | None = None

    def collect(
        self, is_filtered: np.ndarray, sampled: list[list[int]]
    ) -> SamplingMaskLists | None:
        """Return the kept ids of each sampled token, none for those of requests without a top_k.

        Args:
            is_filtered: for each request of the batch, in order, whether it has a top_k.
            sampled: the tokens of each request."""
        logprobs, self.logprobs = self.logprobs, None
        if logprobs is None or not sampled:
            return None
        width, remainder = divmod(len(logprobs), len(sampled))
        assert width and not remainder, f"{len(logprobs)} rows of {len(sampled)} requests"
        # One row a request, sampled from or not; with drafts those of the tokens that were taken.
        lengths = np.ones(len(sampled), int) if width == 1 else np.array([*map(len, sampled)])
        request = np.repeat(np.arange(len(sampled)), lengths)
        offsets = np.arange(len(request)) - np.repeat(lengths.cumsum() - lengths, lengths)
        rows = torch.from_numpy((request * width + offsets)[is_filtered[request]])
        is_kept = logprobs[rows] > -torch.inf
        counts = np.zeros(len(request), np.int64)
        counts[is_filtered[request]] = is_kept.sum(1).numpy()
        token_ids = is_kept.nonzero()[:, 1].to(torch.int32).numpy()
        boundaries = None if width == 1 else np.cumsum([0, *lengths]).tolist()
        return SamplingMaskLists(token_ids, np.cumsum([0, *counts]), boundaries)


def fix_top_k_without_drafts() -> None:
    """Have a pass in which no sequence has a draft take a top_k without a top_p. On CPU, once.

    Upstream: v1/sample/ops/topk_topp_sampler.py: `apply_top_k_only` takes the maximum of no
    numbers. Without it: the engine dies. Goes when: that is corrected."""
    from vllm.v1.sample.ops import topk_topp_sampler

    upstream = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: Tensor, k: Tensor) -> Tensor:
        return upstream(logits, k) if len(logits) else logits

    topk_topp_sampler.apply_top_k_only = apply_top_k_only


def accept_requests_without_top_k() -> None:
    """Have requests without a top_k (of teachers, probes, evaluations) go without a mask on
    an engine that returns masks. Once.

    Upstream: v1/engine/input_processor.py: `InputProcessor._validate_params`. Without it: they are
    refused. Goes when: masks are asked for by request."""
    from vllm.v1.engine.input_processor import InputProcessor

    validate_params = InputProcessor._validate_params

    def validate(self: Any, params: Any, *arguments: Any) -> Any:
        model_config = self.model_config
        if not model_config.return_sampling_mask or getattr(params, "top_k", 0) > 0:
            return validate_params(self, params, *arguments)
        self.model_config = copy.copy(model_config)
        self.model_config.return_sampling_mask = False
        try:
            return validate_params(self, params, *arguments)
        finally:
            self.model_config = model_config

    InputProcessor._validate_params = validate


def omit_masks_of_whole_vocabulary() -> None:
    """Have a token that was drawn from the whole vocabulary come without ids. On a GPU, once.

    Upstream: v1/worker/gpu/sample/output.py: `SamplingMaskTensors.tolists`. Without it: 4 bytes for
    each id of the vocabulary, at each token of requests without a top_k. Goes when: masks are asked
    for by request."""
    from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

    to_lists = SamplingMaskTensors.tolists

    def tolists(self: Any, *arguments: Any) -> SamplingMaskLists:
        counts = self.counts.cpu()
        listed_counts = torch.where(counts == self.vocab_size, 0, counts)
        return to_lists(self._replace(counts=listed_counts), *arguments)

    SamplingMaskTensors.tolists = tolists


def return_masks_on_cpu() -> None:
    """Make --return-sampling-mask work with the first model runner, for requests with a top_k. On
    CPU, once.

    Upstream: config/vllm.py: `VllmConfig._verify_sampling_replay_config` asks for the second one.
    Goes when: that runs on a CPU."""
    from vllm.config import VllmConfig
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    verify_config, gather = VllmConfig._verify_sampling_replay_config, Sampler.gather_logprobs
    sample, sample_tokens = CPUModelRunner._sample, CPUModelRunner.sample_tokens
    collector = SamplingMaskCollector()
    active_collectors: list[SamplingMaskCollector] = []

    def verify(config: Any) -> None:
        parts = {"model_config": config.model_config, "use_v2_model_runner": True}
        verify_config(SimpleNamespace(**parts, speculative_config=config.speculative_config))

    def gather_logprobs(logprobs: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        for active_collector in active_collectors:
            active_collector.logprobs = logprobs
        return gather(logprobs, *arguments, **kwargs)

    def sample_and_keep(self: Any, *arguments: Any) -> Any:
        if self.model_config.return_sampling_mask:
            active_collectors.append(collector)
        try:
            return sample(self, *arguments)
        finally:
            active_collectors.clear()  # log-probabilities of prompts are gathered by it, too, later

    def sample_with_masks(self: Any, *arguments: Any) -> Any:
        collector.logprobs = None
        output = sample_tokens(self, *arguments)
        if output is not None and self.model_config.return_sampling_mask:
            requests = (self.requests[name] for name in self.input_batch.req_ids)
            is_filtered = np.array(
                [request.sampling_params.top_k > 0 for request in requests], bool
            )
            output.sampling_masks = collector.collect(is_filtered, output.sampled_token_ids)
        return output

    VllmConfig._verify_sampling_replay_config = verify
    Sampler.gather_logprobs = staticmethod(gather_logprobs)
    CPUModelRunner._sample = sample_and_keep
    CPUModelRunner.sample_tokens = sample_with_masks
