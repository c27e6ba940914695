"""Tokens that samples of a micro-batch share (`parallel.share_prompts`): a prompt, or turns of a
tree.

What is shared is computed once (`models.shared_prefixes`); `controller.trainer_calls.packing`
packs the samples of one prompt together, all turns of a tree among them.

Imports neither torch nor Megatron, because the controller imports it."""

from bisect import bisect, insort

import numpy as np

from megatron_r1.trainer.training_sample import Sample


class PrefixMatcher:
    """The tokens that samples, added one after the other, share with earlier ones.

    A sample skips tokens that an earlier one, its parent, begins with too, up to the last token
    before its first trained one: that token predicts what only this sample is trained on. So every
    trained token is in its own sample, and a branch of a tree has only what follows the turns of
    earlier branches.

    Attributes:
        parents: for each sample the number of the earlier one that has its skipped tokens, or -1.
        prefix_lengths: for each sample the number of these tokens; more than its parent skips."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.prefix_lengths: list[int] = []
        self._sorted: list[tuple[bytes, int]] = []

    def shared_prefix(self, sample: Sample) -> tuple[int, int]:
        """Return (parent, skipped) of a sample if it were added next.

        In the order of their bytes a sample shares most with one of its two neighbors."""
        tokens, max_length = bytes(sample.token_ids), sample.prompt_length - 1
        position = bisect(self._sorted, (tokens, len(self.parents)))
        neighbors = self._sorted[max(0, position - 1) : position + 1]
        num_common, parent = max(
            ((_common_tokens(tokens, neighbor), number) for neighbor, number in neighbors),
            default=(0, -1),
        )
        num_skipped = min(num_common, max_length)
        if num_skipped < min(max_length, MIN_SHARED_TOKENS) or not num_skipped:
            return -1, 0
        while parent >= 0 and num_skipped <= self.prefix_lengths[parent]:
            parent = self.parents[parent]
        return parent, num_skipped

    def add(self, sample: Sample) -> int:
        """Add a sample; return the number of its tokens that are not shared."""
        parent, num_skipped = self.shared_prefix(sample)
        insort(self._sorted, (bytes(sample.token_ids), len(self.parents)))
        self.parents.append(parent)
        self.prefix_lengths.append(num_skipped)
        return len(sample) - num_skipped


MIN_SHARED_TOKENS = 16
"""Tokens of a prefix that is shared though it is not all that could be: each prefix costs a call of
the attention kernel, and a few equal words of two questions save less."""


def _common_tokens(first: bytes, second: bytes) -> int:
    """Return the number of tokens that both begin with."""
    count = min(len(first), len(second)) // 4
    is_different = np.frombuffer(first, np.int32, count) != np.frombuffer(second, np.int32, count)
    return int(is_different.argmax()) if is_different.any() else count


def group_by_first_prompt(samples: list[Sample]) -> list[list[int]]:
    """Return groups of sample indices; all samples of a group begin with its shortest sample's
    prompt, which the prompts of later turns continue. The first branch of an
    episode comes before those that continue its turns."""
    members_by_prompt: dict[bytes, list[int]] = {}
    lengths: list[int] = []
    for number in sorted(range(len(samples)), key=lambda i: samples[i].prompt_length):
        sample = samples[number]
        prompt = bytes(sample.token_ids[: 4 * sample.prompt_length])
        if prompt not in members_by_prompt:
            starts = (prompt[: 4 * length] for length in lengths)
            root = next((start for start in starts if start in members_by_prompt), None)
            if root is None:
                members_by_prompt[prompt] = []
                lengths = sorted({*lengths, sample.prompt_length})
            else:
                prompt = root
        members_by_prompt[prompt].append(number)
    return [_depth_first(samples, members) for members in members_by_prompt.values()]


def _depth_first(samples: list[Sample], members: list[int]) -> list[int]:
    """Return `members`, each followed by those that continue it."""
    matcher = PrefixMatcher()
    for member in members:
        matcher.add(samples[member])
    children: dict[int, list[int]] = {}
    for place, parent in enumerate(matcher.parents):
        children.setdefault(parent, []).append(place)
    ordered_members, places_left = [], children.get(-1, [])[::-1]
    while places_left:
        place = places_left.pop()
        ordered_members.append(members[place])
        places_left += children.get(place, [])[::-1]
    return ordered_members
