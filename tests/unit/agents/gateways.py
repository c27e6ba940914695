"""A gateway before an engine whose answers are written beforehand."""

import asyncio
import contextlib
import itertools
from array import array

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.gateway import Gateway, SessionLimits, TurnSampler, TurnSampling
from megatron_r1.agents.parsing import Parsed
from megatron_r1.engine.responses import Response
from tests.chat_tokenizer import chat_tokenizer
from tests.unit.agents.sessions import parse

LIMITS = SessionLimits(max_turns=20, max_tokens=4000)


class WrittenFleet:
    """Answers each call with the next text of `texts` (an exception is raised); journals calls."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.calls, self.sampling = [], []
        self.logprobs = itertools.count(1)
        self.ready = asyncio.Event()
        self.ready.set()

    async def generate(self, prompt_token_ids, *, n, max_tokens, **sampling):
        assert n == 1
        self.sampling.append(sampling | {"max_tokens": max_tokens})
        text = self.texts.pop(0)
        await self.ready.wait()
        if isinstance(text, Exception):
            raise text
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = [*ids, self.tokenizer.eos_token_id][:max_tokens]
        reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
        logprobs = array("f", [-next(self.logprobs) / 1024 for _ in ids])
        response = Response(array("i", ids), logprobs, array("i", [7] * len(ids)), reason)
        self.calls.append((list(prompt_token_ids), response))
        return [response]


class WrittenParsers:
    """Reads answers as the tests' sessions do, in this process."""

    async def parse(self, text, token_ids, prompt_token_ids, tools):
        message = parse(text)
        calls = message.get("tool_calls", [])
        return Parsed(message.get("reasoning_content"), message["content"], calls)


@contextlib.asynccontextmanager
async def gateway(*texts, limits=LIMITS, tokenizer=None, max_context=2000, **options):
    """Yield a gateway with one session and the fleet behind it."""
    tokenizer = tokenizer or chat_tokenizer()
    fleet = WrittenFleet(tokenizer, texts)

    def decode(ids):
        ends = len(ids) and ids[-1] == tokenizer.eos_token_id
        return tokenizer.decode(list(ids[:-1] if ends else ids), skip_special_tokens=False)

    sampler = TurnSampler(fleet, decode, WrittenParsers())
    async with Gateway(sampler, Continuation(tokenizer), **options) as served:
        session = served.open(limits, TurnSampling(max_context, tokenizer.eos_token_id))
        yield served, session, fleet


def check_tree(session, calls):
    """What is trained is what the engine sampled, each token once, after what it was given."""
    wholes = [prompt + response.token_ids.tolist() for prompt, response in calls]
    trained = []
    for branch in session.tree.branches():
        assert branch.token_ids.tolist() in wholes
        flags = zip(branch.is_sampled, branch.token_ids, branch.logprobs, strict=True)
        trained += [(token, logprob) for flag, token, logprob in flags if flag]
    sampled = [pair for _, r in calls for pair in zip(r.token_ids, r.logprobs, strict=True)]
    assert sorted(trained) == sorted(sampled)
