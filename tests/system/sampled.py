"""What an engine sampled against what transformers says of it; for tests of real engines."""

import asyncio

from tiny_models import reference_logprobs

# fp32 on both sides, sums of a few hundred terms in another order: about 4e-6 is seen.
TOLERANCE = 1e-4
PROMPTS = [[5, 9, 33, 12], [60], list(range(3, 40))]


async def sample(engine, *, n=4, max_tokens=24, **sampling):
    """A group for each prompt, all at once; `engine` is a fleet or a client."""
    calls = (engine.generate(prompt, n=n, max_tokens=max_tokens, **sampling) for prompt in PROMPTS)
    return await asyncio.gather(*calls)


def largest_difference(oracle, folder, groups, temperature=1.0):
    """Of a log-probability of a sampled token from transformers' with the model in `folder`.
    groups: of PROMPTS."""
    largest = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        responses = [list(completion.token_ids) for completion in group]
        expected = oracle(reference_logprobs, folder, prompt, responses, temperature)
        for completion, reference in zip(group, expected, strict=True):
            pairs = zip(completion.logprobs, reference, strict=True)
            largest = max(largest, *(abs(x - y) for x, y in pairs))
    return largest


def stamped(groups):
    """The policy versions that made these tokens."""
    return {v for group in groups for completion in group for v in completion.policy_versions}
