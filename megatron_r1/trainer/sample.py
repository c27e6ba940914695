"""A training sample, its form on the way to the trainer ranks (headers in msgpack, and the samples'
own bytes behind them), and the tokens that samples of a micro-batch share (`SharedTokens`).

What is shared is computed once (`models.prefixes`); `controller.trainer_calls.packing` packs the
samples of one prompt together, all turns of a tree among them.

Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

import math
from array import array
from bisect import bisect, insort
from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config

Buffer = bytes | memoryview


class Sample(msgspec.Struct, frozen=True):
    """A training sample: one prompt with its response, or one branch of a trajectory of several
    turns. Its `bytes` may be views of other memory, or of a file.

    Attributes:
        token_ids: int32 bytes, prompt then response.
        logprobs: float32 bytes, the rollout engine's, one per response token (empty for SFT).
        advantage: the same for every response token; with an algorithm's token_advantages, what
            these are computed from (a reward or an advantage). NaN: the sample is not trained on.
        routing: indices [rows, moe layers, topk] of the experts the engine chose, of 1 or 2 bytes
            each (`models.experts`), for the tokens before the last; empty without routing replay.
        teacher: float32 bytes, the teacher's log-probabilities of the response, or None.
        label: the label for a reward model, 1 for a good text, 0 for a bad one.
        mask: a byte per token of the response, 1 where the policy sampled it and is trained on it,
            0 where it was given (a tool's result, a user's turn); empty: all were sampled.
        weight: the sample's share of its trajectory's sampled tokens; those of all branches add up
            to 1.
        num_trajectories: how many trajectories it counts for in a denominator: 1, or 0 for every
            branch but the first."""

    token_ids: bytes
    prompt_length: int
    logprobs: bytes = b""
    advantage: float = 0.0
    routing: bytes = b""
    teacher: bytes | None = None
    label: float = 0.0
    mask: bytes = b""
    weight: float = 1.0
    num_trajectories: int = 1

    @classmethod
    def pack(
        cls,
        prompt: Sequence[int],
        response: Sequence[int],
        logprobs: Sequence[float] | None = None,
        advantage: float = 0.0,
        routing: Buffer = b"",
        teacher: Sequence[float] | None = None,
        label: float = 0.0,
    ) -> Sample:
        """Encode token ids and floats, without copies of floats in an array; ValueError for an
        empty prompt and unequal lengths."""
        if not len(prompt):
            raise ValueError("a sample needs at least one prompt token")
        if logprobs is not None and len(logprobs) != len(response):
            raise ValueError(f"{len(response)} response tokens but {len(logprobs)} logprobs")
        if teacher is not None and len(teacher) != len(response):
            raise ValueError(f"{len(response)} response tokens but {len(teacher)} of the teacher's")
        ids = b"".join((_bytes_of("i", prompt), _bytes_of("i", response)))
        floats = _bytes_of("f", logprobs) if logprobs is not None else b""
        teacher_floats = None if teacher is None else _bytes_of("f", teacher)
        rows = cast(bytes, routing)
        return cls(ids, len(prompt), floats, advantage, rows, teacher_floats, label)

    @classmethod
    def pack_branch(
        cls,
        token_ids: Sequence[int],
        is_sampled: bytes,
        logprobs: Sequence[float],
        advantage: float,
        *,
        weight: float,
        num_trajectories: int,
        routing: Buffer = b"",
        teacher: Sequence[float] | None = None,
    ) -> Sample:
        """Encode a branch, whose prompt is all that was given before its first sampled token; what
        follows the last one is left out, as nothing is learned from it.

        Args:
            token_ids: the whole branch.
            is_sampled: a byte per token, 1 where it is trained on.
            logprobs: one per token.
            advantage: the advantage of every sampled token.
            weight: as of `Sample`.
            num_trajectories: as of `Sample`.
            routing: the routing of all tokens but the last.
            teacher: one per sampled token.

        Raises:
            ValueError: the arguments do not fit each other."""
        first, end, count = is_sampled.find(1), is_sampled.rfind(1) + 1, len(token_ids)
        if first < 1 or not count == len(is_sampled) == len(logprobs):
            raise ValueError(
                f"a branch of {count} tokens has {len(logprobs)} logprobs and a mask of "
                f"{len(is_sampled)}, whose first sampled token is number {first}: it needs a prompt"
            )
        if end < count:
            routing = routing[: len(routing) // (count - 1) * (end - 1)]
        mask = is_sampled[first:end]
        if teacher is not None:
            scores = iter(teacher)
            teacher = array("f", [next(scores) if sampled else 0.0 for sampled in mask])
        prompt, response = token_ids[:first], token_ids[first:end]
        sample = cls.pack(prompt, response, logprobs[first:end], advantage, routing, teacher)
        # Without a mask where all was sampled, as of a single turn.
        mask = mask if 0 in mask else b""
        return msgspec.structs.replace(
            sample, mask=mask, weight=weight, num_trajectories=num_trajectories
        )

    def __len__(self) -> int:
        return len(self.token_ids) // 4

    @property
    def is_trained(self) -> bool:
        """Whether its response is in the sums and denominators of a loss."""
        return not math.isnan(self.advantage)


def _bytes_of(typecode: str, numbers: Sequence[float]) -> bytes:
    """Return the bytes of `numbers`: a view where they are an array of that type."""
    if not isinstance(numbers, array) or numbers.typecode != typecode:
        numbers = array(typecode, numbers)
    return cast(bytes, memoryview(numbers).cast("B"))


ReplicaSamples = list[list[list[Sample]]]
"""The samples of one model replica: [i][m] are those of micro-batch m of mini-batch i."""
JOINED_BYTES = 1 << 16
"""Buffers below this size are joined: a part of a message of its own costs a few microseconds."""


BUFFERS = ("token_ids", "logprobs", "routing", "teacher", "mask")
"""The fields of a `Sample` that travel behind the headers, in this order."""
Header = tuple[Sample, list[int | None]]
"""A sample without its buffers, and their sizes; None for a teacher that is None."""


def encode_samples(samples: ReplicaSamples) -> list[Buffer]:
    """Return the parts of a message: the headers, and the samples' buffers one after the other.

    Not one msgpack object, which ends at 4 GiB: routing of 512 x 30,000 tokens is 7 GB."""
    headers: list[list[list[Header]]] = []
    parts: list[Buffer] = []
    small: list[Buffer] = []
    for minibatch in samples:
        headers.append([])
        for microbatch in minibatch:
            headers[-1].append([])
            for sample in microbatch:
                buffers = [getattr(sample, name) for name in BUFFERS]
                sizes = [None if buffer is None else len(buffer) for buffer in buffers]
                bare = msgspec.structs.replace(sample, **dict.fromkeys(BUFFERS, b""))
                headers[-1][-1].append((bare, sizes))
                for buffer in filter(None, buffers):
                    if len(buffer) < JOINED_BYTES:
                        small.append(buffer)
                        continue
                    if small:
                        parts.append(b"".join(small))
                        small.clear()
                    parts.append(buffer)
    return [msgspec.msgpack.encode(headers), *parts, b"".join(small)]


def decode_samples(headers: Buffer, buffers: memoryview) -> ReplicaSamples:
    """Return the samples that `encode_samples` encoded; they refer to `buffers`.

    Args:
        headers: the first part of its message.
        buffers: the others, joined."""
    end = 0

    def take(size: int | None) -> memoryview | None:
        nonlocal end
        if size is None:
            return None
        end += size
        return buffers[end - size : end]

    def sample(header: Header) -> Sample:
        bare, sizes = header
        return msgspec.structs.replace(bare, **dict(zip(BUFFERS, map(take, sizes), strict=True)))

    minibatches = msgspec.msgpack.decode(headers, type=list[list[list[Header]]])
    return [
        [[sample(header) for header in microbatch] for microbatch in minibatch]
        for minibatch in minibatches
    ]


def check_shared_prompts(config: Config, on_gpu: bool, is_plain: bool) -> None:
    """Raise UserError where `parallel.share_prompts` does not go with the device, the model or a
    setting.

    Args:
        config: the recipe.
        on_gpu: whether the trainer runs on a GPU.
        is_plain: whether attention has neither windows nor softmax offsets."""
    if not config.parallel.share_prompts:
        return
    obstacles = {
        "a GPU: Transformer Engine's attention has no mask of a tree (docs/parallelism.md)": on_gpu,
        f"parallel.context: {config.parallel.context}": config.parallel.context > 1,
        "a model with attention windows or softmax offsets": not is_plain,
        "rl.routing_replay": config.rl.routing_replay,
        "model.mtp: train": config.model.mtp == "train",
        "model.expert_bias_update_rate, which counts tokens": config.model.expert_bias_update_rate
        > 0,
    }
    if found := [name for name, is_there in obstacles.items() if is_there]:
        raise UserError(
            f"parallel.share_prompts: true does not go with {found[0]}; leave it out",
            key="parallel.share_prompts",
            cause=Cause.CONFLICT,
        )


class SharedTokens:
    """The tokens that samples, added one after the other, share with earlier ones.

    A sample skips tokens that an earlier one, its host, begins with too, up to the last token
    before its first trained one: that token predicts what only this sample is trained on. So every
    trained token is in its own sample, and a branch of a tree has only what follows the turns of
    earlier branches.

    Attributes:
        hosts: for each sample the number of the earlier one that has its skipped tokens, or -1.
        skipped: for each sample the number of these tokens; more than its host skips."""

    def __init__(self) -> None:
        self.hosts: list[int] = []
        self.skipped: list[int] = []
        self._sorted: list[tuple[bytes, int]] = []

    def of(self, sample: Sample) -> tuple[int, int]:
        """Return (host, skipped) of a sample if it were added next.

        In the order of their bytes a sample shares most with one of its two neighbors."""
        tokens, most = bytes(sample.token_ids), sample.prompt_length - 1
        at = bisect(self._sorted, (tokens, len(self.hosts)))
        near = self._sorted[max(0, at - 1) : at + 1]
        common, host = max(
            ((_common_tokens(tokens, other), number) for other, number in near), default=(0, -1)
        )
        skipped = min(common, most)
        if skipped < min(most, LEAST_SHARED) or not skipped:
            return -1, 0
        while host >= 0 and skipped <= self.skipped[host]:
            host = self.hosts[host]
        return host, skipped

    def add(self, sample: Sample) -> int:
        """Add a sample; return the number of its tokens that are not shared."""
        host, skipped = self.of(sample)
        insort(self._sorted, (bytes(sample.token_ids), len(self.hosts)))
        self.hosts.append(host)
        self.skipped.append(skipped)
        return len(sample) - skipped


LEAST_SHARED = 16
"""Tokens of a prefix that is shared though it is not all that could be: each prefix costs a call of
the attention kernel, and a few equal words of two questions save less."""


def _common_tokens(first: bytes, second: bytes) -> int:
    """Return the number of tokens that both begin with."""
    count = min(len(first), len(second)) // 4
    different = np.frombuffer(first, np.int32, count) != np.frombuffer(second, np.int32, count)
    return int(different.argmax()) if different.any() else count


def by_first_prompt(samples: list[Sample]) -> list[list[int]]:
    """Return the indices of the samples that begin with the same prompt: of each group the shortest
    of its samples, of which the prompts of later turns are continuations. The first branch of an
    episode comes before those that continue its turns."""
    found: dict[bytes, list[int]] = {}
    lengths: list[int] = []
    for number in sorted(range(len(samples)), key=lambda i: samples[i].prompt_length):
        sample = samples[number]
        prompt = bytes(sample.token_ids[: 4 * sample.prompt_length])
        if prompt not in found:
            starts = (prompt[: 4 * length] for length in lengths)
            root = next((start for start in starts if start in found), None)
            if root is None:
                found[prompt] = []
                lengths = sorted({*lengths, sample.prompt_length})
            else:
                prompt = root
        found[prompt].append(number)
    return [_depth_first(samples, members) for members in found.values()]


def _depth_first(samples: list[Sample], members: list[int]) -> list[int]:
    """Return `members`, each followed by those that continue it."""
    shared = SharedTokens()
    for member in members:
        shared.add(samples[member])
    children: dict[int, list[int]] = {}
    for place, host in enumerate(shared.hosts):
        children.setdefault(host, []).append(place)
    ordered, waiting = [], children.get(-1, [])[::-1]
    while waiting:
        place = waiting.pop()
        ordered.append(members[place])
        waiting += children.get(place, [])[::-1]
    return ordered
