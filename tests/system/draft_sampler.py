"""vLLM's own rejection sampler, on a CPU, in a process of its own (see the fixture `oracle`)."""

import os

VOCABULARY, DRAFTS = 12, 2


def draw(num_samples, temperature, top_p):
    """Sample two tokens behind two drafts, again and again.

    Returns the logits (positions, vocabulary), the drafts, the samples (None for a token that was
    not sampled, as the draft before it was rejected) and the largest difference of a
    log-probability from log softmax of the cut logits."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as engines on a CPU
    import torch
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    torch.manual_seed(0)
    logits = 1.5 * torch.randn(DRAFTS + 1, VOCABULARY)
    drafts = logits[:DRAFTS].argmax(-1).tolist()
    rows = DRAFTS + 1
    plan = SpecDecodeMetadata.make_dummy([drafts] * num_samples, torch.device("cpu"))
    places = torch.arange(num_samples * rows, dtype=torch.int32).view(num_samples, rows)
    plan.target_logits_indices = places[:, :DRAFTS].flatten()
    plan.bonus_logits_indices = places[:, DRAFTS].contiguous()
    every = torch.ones(num_samples)
    settings = SamplingMetadata(
        temperature=temperature * every,
        all_greedy=False,
        all_random=True,
        top_p=top_p * every if top_p < 1 else None,
        top_k=None,
        generators={},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=0 * every,
        presence_penalties=0 * every,
        repetition_penalties=every,
        output_token_ids=[[] for _ in range(num_samples)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        logprob_token_ids=None,
        spec_token_ids=[[] for _ in range(num_samples)],
    )
    sampler = RejectionSampler(Sampler(logprobs_mode="processed_logprobs"))
    output = sampler(plan, None, logits.repeat(num_samples, 1), settings)
    parse = RejectionSampler.parse_output
    tokens, found = parse(output.sampled_token_ids, VOCABULARY, (), output.logprobs_tensors)
    cut = nucleus(logits / temperature, top_p).log()
    expected = [cut[at, token] for sample in tokens for at, token in enumerate(sample)]
    gap = (torch.tensor(found.logprobs[:, 0]) - torch.stack(expected)).abs().max().item()
    padded = [sample + [None] * (rows - len(sample)) for sample in tokens]
    return logits.tolist(), drafts, padded, gap


def nucleus(logits, top_p):
    """Probabilities of the fewest tokens that together have top_p, scaled to one."""
    import torch

    ordered, index = logits.softmax(-1).sort(-1, descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    kept = torch.zeros_like(kept).scatter(-1, index, kept)
    return kept / kept.sum(-1, keepdim=True)


def probability(found, expected):
    """Of a chi-square statistic at least as large; cells expected fewer than 5 times are one."""
    import torch

    expected = expected.flatten() * found.sum()
    assert found[expected == 0].sum() == 0, "tokens that cannot be sampled"
    rare = expected < 5
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found, expected = found[expected > 0], expected[expected > 0]
    statistic = ((found - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(found) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()
