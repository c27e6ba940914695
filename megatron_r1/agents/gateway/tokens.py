"""vLLM's token mode: POST /inference/v1/generate, token ids in and out.

`renderers`, which verifiers trains with, reads each token from `token`, "token_id:N"; vLLM itself
sends the integer `token_id` (both are sent)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_r1.agents.gateway import chat
from megatron_r1.agents.gateway.body import SAMPLING, Body
from megatron_r1.agents.gateway.request import RequestError, TurnReply, TurnRequest

NEUTRAL_VALUES = SAMPLING | {"stop_token_ids": None, "min_tokens": 0, "ignore_eos": None}
IGNORED_FIELDS = (
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "routed_experts_prompt_start",
    "detokenize",
    "include_stop_str_in_output",
    "output_kind",
)


def parse_request(body: Body, stored: object) -> TurnRequest:
    """Return the turn that a body requests.

    Args:
        body: the request's body.
        stored: not used here.

    Raises:
        RequestError: for a body that cannot be served."""
    model = body.take("model", str, "")
    body.ignore("request_id", "cache_salt", "priority", "return_token_ids")
    token_ids = body.take("token_ids", list)
    if not token_ids or not all(type(t) is int and 0 <= t < 2**31 for t in token_ids):
        raise RequestError("must be a list of at least one token id", "token_ids")
    body.take_fixed(stream=False, output_mode="tokens")
    sampling = Body(body.take("sampling_params", dict, {}), "sampling_params")
    sampling.ignore(*IGNORED_FIELDS)
    sampling.take_choice("logprobs", (0, 1), 0)  # the sampled token's own is sent
    sampling.take_fixed(n=1, prompt_logprobs=0)
    request = TurnRequest(
        [],
        [],
        model,
        max_tokens=sampling.take_positive("max_tokens"),
        options=sampling.options(NEUTRAL_VALUES),
        token_ids=token_ids,
    )
    sampling.finish()
    body.finish()
    return request


def format_reply(turn: TurnReply, request: TurnRequest) -> dict[str, Any]:
    """Return a turn as token ids, each with its log-probability, and the policy versions of its
    spans."""
    response = turn.response
    content = [
        {"token": f"token_id:{token}", "token_id": token, "logprob": logprob, "top_logprobs": []}
        for token, logprob in zip(response.token_ids, response.logprobs, strict=True)
    ]
    choice = {
        "index": 0,
        "token_ids": response.token_ids.tolist(),
        "logprobs": {"content": content},
        "finish_reason": response.finish_reason,
        "weight_versions": _version_spans(response.policy_versions),
    }
    return {"request_id": turn.id, "choices": [choice], "prompt_logprobs": None}


def format_events(turn: TurnReply, request: TurnRequest) -> Iterator[bytes]:
    """Stop with an error, because `parse_request` has refused every request for a stream.

    Raises:
        AssertionError: always."""
    raise AssertionError("token mode has no streams")


format_error, format_error_event = chat.format_error, chat.format_error_event
KEEP_ALIVE = chat.KEEP_ALIVE


def _version_spans(versions: Iterable[int]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for index, version in enumerate(versions):
        if spans and spans[-1]["version"] == str(version):
            spans[-1]["end"] = index + 1
        else:
            spans.append({"version": str(version), "start": index, "end": index + 1})
    return spans
