"""What the plugin makes of the sampler's log-probabilities after a cut, read with vLLM's own
`SamplingMaskLists`."""

import numpy as np
import pytest
import torch

OUT = -torch.inf


@pytest.fixture(scope="module")
def plugin():
    from megatron_r1.engines.plugin import sampling_masks

    return sampling_masks


def of(masks, request, count):
    """What vLLM's scheduler takes of the first `count` tokens of a request."""
    return masks.slice_request(request, count).to_nested_list()


def test_each_request_has_the_tokens_of_its_row(plugin):
    collector = plugin.KeptCollector()
    collector.logprobs = torch.tensor([[OUT, -1, -2, OUT], [-3, OUT, OUT, -1], [-1, -1, -1, -1.0]])
    # The second is a prompt that is not read to its end, the third asked for no cut.
    masks = collector.collect(np.array([True, True, False]), [[1], [], [0]])
    assert [of(masks, request, 1) for request in range(3)] == [[[1, 2]], [[0, 3]], [[]]]
    assert collector.logprobs is None and collector.collect(np.array([True]), [[1]]) is None


def test_accepted_drafts_and_the_token_after_them_have_theirs(plugin):
    collector = plugin.KeptCollector()
    rows = torch.full((9, 5), OUT)
    for row in range(9):
        rows[row, row % 5] = rows[row, (row + 2) % 5] = -0.7
    collector.logprobs = rows
    # Two drafts each: one accepted and the next token, both accepted, none sampled.
    masks = collector.collect(np.array([True, False, True]), [[0, 1], [3, 4, 0], []])
    assert of(masks, 0, 2) == [[0, 2], [1, 3]] and of(masks, 0, 1) == [[0, 2]]
    assert of(masks, 1, 3) == [[], [], []]
    masks.slice_request(2, 0)
    collector.logprobs = rows
    masks = collector.collect(np.array([False, True, True]), [[0], [3, 4, 0], [1]])
    assert of(masks, 1, 3) == [[0, 3], [1, 4], [0, 2]] and of(masks, 2, 1) == [[1, 3]]


def test_a_pass_without_drafts_takes_a_top_k(plugin, monkeypatch):
    from vllm.v1.sample.ops import topk_topp_sampler as upstream

    monkeypatch.setattr(upstream, "apply_top_k_only", upstream.apply_top_k_only)
    plugin.cut_passes_without_drafts()
    nothing, none = torch.zeros(0, 9), torch.zeros(0, dtype=torch.int32)
    assert upstream.apply_top_k_only(nothing, none).shape == (0, 9)
    cut = upstream.apply_top_k_only(torch.tensor([[1.0, 3, 2]]), torch.tensor([2]))
    assert cut.tolist() == [[OUT, 3, 2]]
