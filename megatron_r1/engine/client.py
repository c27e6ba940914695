"""Talk to one engine: token ids in, sampled tokens out; weight updates."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import msgspec

from megatron_r1.engine.errors import (
    ConnectionBroken,
    EngineError,
    EngineFault,
    EngineTimeout,
)
from megatron_r1.engine.routing import decode_routing
from megatron_r1.models.routing_shape import RoutingShape

BODY_EXCERPT_CHARS = 500
# What vLLM sends for NaN and -inf (scale_out/token_in_token_out/serving.py, _clamp_logprob).
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Response:
    """One sampled response. All three arrays have one entry per token: 12 bytes, where lists of
    Python's numbers take 70 and a rollout has 2e8 tokens."""

    token_ids: array[int]
    """int32, including the stop token, if one ended it."""
    logprobs: array[float]
    """float32: log softmax(logits / temperature) of each token, after the top-p cut if any."""
    policy_versions: array[int]
    """int32: of the weights that made each token."""
    finish_reason: str
    """`stop`: a stop token. `length`: max_tokens or max_model_len. `abort`: cut by a pause."""
    routing: bytes = b""
    """If asked for: indices of the experts that prompt and response passed through, without the
    last token; see `rollout.routing`."""


class TokenLogprob(msgspec.Struct):
    logprob: float


class Logprobs(msgspec.Struct):
    content: list[TokenLogprob] | None = None


class VersionSpan(msgspec.Struct):
    version: str
    start: int
    end: int


class Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    weight_versions: list[VersionSpan] | None = None
    routed_experts: str | None = None


class GenerateResponse(msgspec.Struct):
    choices: list[Choice]


class ScoreResponse(msgspec.Struct):
    prompt_logprobs: list[dict[str, TokenLogprob] | None]
    """Of each token of the prompt but the first, by its id."""


decode_response = msgspec.json.Decoder(GenerateResponse).decode
decode_scores = msgspec.json.Decoder(ScoreResponse).decode


class EngineClient:
    """Asynchronous client of one vLLM server: `async with EngineClient(url) as client`."""

    def __init__(
        self,
        url: str,
        *,
        secret: str = "",
        timeout_seconds: float = 1800.0,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            url: `http://host:port`.
            secret: the server's (`EngineServer`); empty: it has none.
            timeout_seconds: for one call, from sending to the last byte.
            vocab_size: of the model; tokens beyond it are an error.
        """
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self.timeout_seconds, self.vocab_size = timeout_seconds, vocab_size
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = None,
        routing: RoutingShape | None = None,
    ) -> list[Response]:
        """Sample n responses to one prompt in one request.

        Args:
            stop_token_ids: the only tokens that end a response.
            temperature: 0 is greedy; the log-probabilities then are those at temperature 1.
            seed: makes the n responses reproducible for the same weights and the same batch
                composition; the engine then draws sequence by sequence, which is slower. None: from
                the engine's own seed.
            routing: the model's, to be given the experts of every token; the engine must have been
                started for it.

        Raises:
            EngineFault: the answer is not n responses of known tokens with one finite
                log-probability per token (and the experts of every token, if asked for), or the
                engine failed to answer.
            EngineError: it refused, or took too long.
        """
        sampling = {
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": True,  # config.json's eos_token_id stops nothing unless it is named
            "logprobs": 0,  # the sampled token's only
            "detokenize": False,
            "seed": seed,
        }
        body = {"token_ids": list(prompt_token_ids), "sampling_params": sampling}
        answer = await self._call("POST", "/inference/v1/generate", body)
        try:
            choices = decode_response(answer).choices
            completions = [
                response_of(choice, len(prompt_token_ids), routing, self.vocab_size)
                for choice in choices
            ]
        except (msgspec.MsgspecError, ValueError) as error:
            raise EngineFault(
                f"{self.url}/inference/v1/generate: {error}: {shorten(answer)}"
            ) from error
        if len(completions) != n:
            raise EngineFault(f"{self.url}: asked for {n} responses, got {len(completions)}")
        return completions

    async def score(self, token_ids: Sequence[int], first: int) -> array[float]:
        """The log-probabilities of given tokens, each after all before it, at temperature 1.

        Args:
            token_ids: at most one less than the engine's max_model_len: vLLM always samples one
                more, which is dropped.
            first: index of the first token to score, at least 1.

        Returns:
            float32, one for each of token_ids[first:].

        Raises:
            EngineFault: the answer is not one finite number for each of these tokens, or the engine
                failed to answer.
            EngineError: it refused, or took too long.
        """
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,  # the token's own only
            "detokenize": False,
        }
        body = {"token_ids": list(token_ids), "sampling_params": sampling}
        answer = await self._call("POST", "/inference/v1/generate", body)
        try:
            return scores_of(decode_scores(answer).prompt_logprobs, token_ids, first)
        except (msgspec.MsgspecError, ValueError) as error:
            raise EngineFault(
                f"{self.url}/inference/v1/generate: {error}: {shorten(answer)}"
            ) from error

    async def pause(self, mode: Literal["keep", "wait", "abort"] = "keep") -> None:
        """Stop sampling: `keep` freezes what runs, `wait` lets it end, `abort` returns it as is."""
        await self._call("POST", f"/pause?mode={mode}")

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Connect it to a trainer (`vllm_plugin.backend.PushInitInfo`), before the first update."""
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": dict(init_info)})

    async def swap_weights(
        self,
        update_info: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        version: int,
        *,
        resume: bool = True,
    ) -> None:
        """Bring landed weights into use and stamp what follows with `version`; the engine stops for
        it, amid whatever is in flight, and goes on if it is to `resume`.

        A sequence in flight goes on under the new weights, keys and values of its earlier tokens
        computed again, so that each token's log-probability is that of the policy it is stamped
        with.

        Args:
            update_info: of the engine's backend (`vllm_plugin.backend.PushUpdateInfo`). A sequence
                is handed out in order, one per worker.

        Raises:
            EngineError: the push did not arrive as it was sent, or the engine could not load it. It
                is stopped then, and unless nothing had changed yet it must not go on.
        """
        body = {"update_info": update_info, "weight_version": str(version), "resume": resume}
        await self._call("POST", "/swap_weights", body)

    async def set_version(self, version: int) -> None:
        """Name the weights that the engine holds already."""
        await self._call("POST", "/update_weight_version", {"new_version": str(version)})

    async def version(self) -> str:
        """The engine's name for its weights: a number once one was set."""
        answer = await self._call("GET", "/weight_info")
        return str(msgspec.json.decode(answer)["weight_version"])

    async def sleep(self, level: Literal[1, 2] = 2) -> None:
        """Give the GPU's memory away: caches are dropped; weights are dropped too (2), or kept in
        host memory (1). Nothing may be in flight."""
        await self._call("POST", f"/sleep?level={level}&mode=wait")

    async def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Take memory back. After level 2 the weights hold nothing until they are updated; the
        engine samples again once it has both."""
        await self._call("POST", f"/wake_up?tags={tag}")

    async def is_sleeping(self) -> bool:
        """Asks the engine core, which answers between two of its steps."""
        answer = await self._call("GET", "/is_sleeping")
        return bool(msgspec.json.decode(answer)["is_sleeping"])

    async def _call(self, method: str, path: str, body: Any = None) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # One connection per call: vLLM closes idle ones after 5 seconds, and any after a
                # status 500, unannounced; a call on such a one would fail. No limit on their
                # number, as the default of 100 would hold groups back.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self.timeout_seconds),
                headers=self.headers,
            )
        payload = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method, self.url + path, data=payload, headers=headers
            ) as response:
                answer = await response.read()
        except TimeoutError as error:
            raise EngineTimeout(
                f"{self.url}{path}: no answer in {self.timeout_seconds:.0f} seconds"
            ) from error
        except aiohttp.ClientError as error:
            told = f"{self.url}{path}: {type(error).__name__}: {error}"
            raise ConnectionBroken(told) from error
        if response.status != 200:
            message = f"{self.url}{path}: status {response.status}: {shorten(answer)}"
            fault = EngineFault if response.status >= 500 else EngineError
            raise fault(message, response.status)
        return answer


def response_of(
    choice: Choice,
    prompt_length: int = 0,
    routing: RoutingShape | None = None,
    vocab_size: int | None = None,
) -> Response:
    """Check one choice and turn it round: versions per token instead of spans, experts as bytes.

    Raises:
        ValueError: says what is wrong with it.
    """
    token_ids = choice.token_ids or []
    content = choice.logprobs.content if choice.logprobs else None
    logprobs = [entry.logprob for entry in content or []]
    if len(logprobs) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens but {len(logprobs)} log-probabilities")
    for token, logprob in zip(token_ids, logprobs, strict=True):
        if not math.isfinite(logprob) or logprob <= LOWEST_LOGPROB:
            raise ValueError(f"the log-probability of token {token} is {logprob}")
    if vocab_size and token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise ValueError(f"tokens {min(token_ids)} to {max(token_ids)} of {vocab_size}")
    num_tokens = prompt_length + len(token_ids)
    experts = decode_routing(choice.routed_experts, routing, num_tokens) if routing else b""
    return Response(
        array("i", token_ids),
        array("f", logprobs),
        versions_per_token(choice.weight_versions or [], len(token_ids)),
        choice.finish_reason or "abort",
        experts,
    )


def scores_of(
    entries: Sequence[Mapping[str, TokenLogprob] | None], token_ids: Sequence[int], first: int
) -> array[float]:
    """The scores of token_ids[first:], float32.

    Raises:
        ValueError: they are of other tokens, or one is no number.
    """
    if len(entries) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens but scores of {len(entries)}")
    scores = array("f")
    for entry, token in zip(entries[first:], token_ids[first:], strict=True):
        scored = (entry or {}).get(str(token))
        if scored is None:
            raise ValueError(f"token {token} has no score")
        if not math.isfinite(scored.logprob) or scored.logprob <= LOWEST_LOGPROB:
            raise ValueError(f"the log-probability of token {token} is {scored.logprob}")
        scores.append(scored.logprob)
    return scores


def versions_per_token(spans: Sequence[VersionSpan], num_tokens: int) -> array[int]:
    """Spread spans [start, end) over tokens.

    Raises:
        ValueError: a version is not a number, or the spans do not cover exactly the tokens.
    """
    versions = array("i")
    for span in spans:
        if span.start != len(versions) or span.end <= span.start:
            raise ValueError(f"weight_versions do not follow each other: {spans}")
        versions.extend([int(span.version)] * (span.end - span.start))
    if len(versions) != num_tokens:
        raise ValueError(f"weight_versions cover {len(versions)} of {num_tokens} tokens")
    return versions


def shorten(body: bytes) -> str:
    text = body.decode(errors="replace")
    return text if len(text) <= BODY_EXCERPT_CHARS else text[:BODY_EXCERPT_CHARS] + "..."
