"""What the plugin makes of the sampler's log-probabilities after a cut, read with vLLM's own
`SamplingMaskLists`."""

from types import SimpleNamespace

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
    collector = plugin.SamplingMaskCollector()
    collector.logprobs = torch.tensor([[OUT, -1, -2, OUT], [-3, OUT, OUT, -1], [-1, -1, -1, -1.0]])
    # The second is a prompt that is not read to its end, the third asked for no cut.
    masks = collector.collect(np.array([True, True, False]), [[1], [], [0]])
    assert [of(masks, request, 1) for request in range(3)] == [[[1, 2]], [[0, 3]], [[]]]
    assert collector.logprobs is None and collector.collect(np.array([True]), [[1]]) is None


def test_accepted_drafts_and_the_token_after_them_have_theirs(plugin):
    collector = plugin.SamplingMaskCollector()
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


def test_requests_without_a_top_k_are_taken_and_others_checked(plugin, monkeypatch):
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.setattr(InputProcessor, "_validate_params", InputProcessor._validate_params)
    plugin.accept_requests_without_top_k()
    processor = object.__new__(InputProcessor)
    model = SimpleNamespace(return_sampling_mask=True, is_diffusion=False)
    processor.model_config = model
    processor.speculative_config = processor.structured_outputs_config = None
    processor.vllm_config = SimpleNamespace(
        reasoning_config=None,
        watermark_config=None,
        use_v2_model_runner=True,
        _check_supports_watermarking=lambda *_: False,
    )
    processor.renderer = SimpleNamespace(tokenizer=None)
    returns_masks = []

    def verify(params, model_config, *_):
        returns_masks.append(model_config.return_sampling_mask)

    monkeypatch.setattr(SamplingParams, "verify", verify)
    processor.validate_logits_processors_params = lambda _: None

    def ask(**settings):
        processor._validate_params(SamplingParams(**settings), ("generate",))

    ask(temperature=0.0)
    ask(temperature=0.6, top_p=0.95)
    ask(temperature=0.6, top_k=5)
    assert returns_masks == [False, False, True]  # upstream's own check is of the last
    assert processor.model_config is model and model.return_sampling_mask


def test_a_gpus_rows_of_the_whole_vocabulary_have_no_ids(plugin, monkeypatch):
    from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

    monkeypatch.setattr(SamplingMaskTensors, "tolists", SamplingMaskTensors.tolists)
    plugin.omit_masks_of_whole_vocabulary()
    # Two ids listed; everything; more than the list holds, as where logits tie: of the bit mask.
    ids = torch.tensor([[1, 2], [0, 1], [0, 3]], dtype=torch.int32)
    bits = torch.tensor([[6], [255], [0b11001001]], dtype=torch.uint8)
    counts = torch.tensor([2, 8, 4], dtype=torch.int32)
    masks = SamplingMaskTensors(ids, bits, counts, 8).tolists()
    assert [of(masks, row, 1) for row in range(3)] == [[[1, 2]], [[]], [[0, 3, 6, 7]]]


def test_a_pass_without_drafts_takes_a_top_k(plugin, monkeypatch):
    from vllm.v1.sample.ops import topk_topp_sampler as upstream

    monkeypatch.setattr(upstream, "apply_top_k_only", upstream.apply_top_k_only)
    plugin.fix_top_k_without_drafts()
    nothing, none = torch.zeros(0, 9), torch.zeros(0, dtype=torch.int32)
    assert upstream.apply_top_k_only(nothing, none).shape == (0, 9)
    cut = upstream.apply_top_k_only(torch.tensor([[1.0, 3, 2]]), torch.tensor([2]))
    assert cut.tolist() == [[OUT, 3, 2]]
