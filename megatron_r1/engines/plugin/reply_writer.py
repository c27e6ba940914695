"""Replies to generate calls in bytes, for clients that accept them
(`engines/server/reply_reader.py`).

vLLM's own reply is JSON with two objects per token: 67 MB for 16 responses of 30,000 tokens, where
ids and log-probabilities are 3.8 MB. It is built in the server's event loop, in which the tokens of
all other requests arrive, and parsed in the controller's."""

import copy
import inspect
from collections.abc import AsyncIterator
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse
from vllm.entrypoints.scale_out.token_in_token_out import api_router as upstream
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.outputs import CompletionOutput, RequestOutput

MEDIA_TYPE = "application/x-megatron-r1-samples"

_generate_json = inspect.unwrap(upstream.generate)


@with_cancellation
@load_aware_call
async def generate_reply(request: GenerateRequest, raw_request: Request) -> Response:
    """Answer as vLLM's endpoint does, in bytes if the client accepts these and asks for nothing
    but tokens, log-probabilities, routed experts and sampling masks."""
    handler = upstream.generate_tokens(raw_request)
    accepts = raw_request.headers.get("accept", "").startswith(MEDIA_TYPE)
    if not accepts or handler is None or request.stream or request.sampling_params.logprobs != 0:
        return await _generate_json(request, raw_request)
    request.sampling_params.flat_logprobs = True
    handler = copy.copy(handler)
    handler.serve_tokens_full_generator = _last_output
    output = await handler.serve_tokens(request, raw_request)
    if not isinstance(output, RequestOutput):
        return upstream.JSONResponse(output.model_dump(), status_code=output.error.code)
    for choice in output.outputs:
        handler._raise_if_error(choice.finish_reason, output.request_id)
    has_top_k = request.sampling_params.top_k > 0
    return StreamingResponse(_reply_chunks(output.outputs, has_top_k), media_type=MEDIA_TYPE)


async def _last_output(request: object, outputs: AsyncIterator[Any], *_: object) -> Any:
    """Return what the engine gives last, in the place of the handler's
    `serve_tokens_full_generator`, which makes the JSON of it."""
    last_output = None
    async for output in outputs:
        last_output = output
    return last_output


async def _reply_chunks(choices: list[CompletionOutput], has_top_k: bool) -> AsyncIterator[bytes]:
    routed_rows = [choice.routed_experts for choice in choices]
    masks = [_encoded_mask(choice) if has_top_k else None for choice in choices]
    descriptions = [
        {
            "finish_reason": choice.finish_reason or "stop",
            "num_tokens": len(choice.token_ids),
            "weight_versions": choice.weight_versions or [],
            "routed_experts": None if rows is None else _array_description(rows),
            "sampling_mask": None if mask is None else len(mask),
        }
        for choice, rows, mask in zip(choices, routed_rows, masks, strict=True)
    ]
    header = msgspec.json.encode({"choices": descriptions})
    yield len(header).to_bytes(4, "little") + header
    for choice, mask in zip(choices, masks, strict=True):
        ids = np.array(choice.token_ids, "<i4")
        yield ids.tobytes() + _choice_logprobs(choice, ids).tobytes() + (mask or b"")
    for rows in routed_rows:
        if rows is not None:
            yield np.ascontiguousarray(rows).tobytes()


def _encoded_mask(choice: CompletionOutput) -> bytes | None:
    """Return the kept ids of every token in the form of `models.sampling_mask`: counts, then ids,
    int32; None where the engine returns none."""
    if choice.sampling_mask is None:
        return None
    kept_ids = choice.sampling_mask.token_ids
    counts = np.array([len(ids) for ids in kept_ids], "<i4")
    return counts.tobytes() + np.fromiter(chain.from_iterable(kept_ids), "<i4").tobytes()


def _array_description(rows: np.ndarray) -> dict[str, Any]:
    return {"dtype": rows.dtype.str, "shape": rows.shape}


def _choice_logprobs(choice: CompletionOutput, ids: np.ndarray) -> np.ndarray:
    """Return the sampled tokens' log-probabilities; NaN, which clients refuse, for a token that the
    engine gives none for."""
    flat_logprobs: Any = choice.logprobs
    first = np.array(flat_logprobs.start_indices, int)[: len(ids)]
    logprobs = np.array(flat_logprobs.logprobs, "<f4")[first]
    return np.where(
        np.array(flat_logprobs.token_ids, "<i4")[first] == ids, logprobs, np.float32(np.nan)
    )


def add_samples() -> None:
    """Put the endpoint before vLLM's, in the server that this process will start."""
    checks = [Depends(validate_json_request)]
    upstream.router.add_api_route(
        "/inference/v1/generate",
        generate_reply,
        methods=["POST"],
        dependencies=checks,
        response_model=None,
    )
    routes = upstream.router.routes
    routes.insert(0, routes.pop())
