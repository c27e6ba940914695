"""What an engine's HTTP server has beyond vLLM's own: a secret for every request, all of a swap of
weights in one call, and samples in bytes.

`SecretMiddleware`: requests to an engine must carry its secret. vLLM's own check (VLLM_API_KEY)
does not cover the calls that pause an engine, replace its weights or run a method by name in its
workers.

`POST /swap_weights`: vLLM's own calls for a swap are six, made while nothing generates, and /pause
sleeps for 20 ms once the engine has stopped (v1/engine/async_llm.py: `AsyncLLM.pause_generation`):
36 ms in all, where the engine itself needs 3.

Replies to generate calls are bytes for clients that accept them (`engines/server/replies.py`).
vLLM's own reply is JSON with two objects per token: 67 MB for 16 responses of 30,000 tokens, where
ids and log-probabilities are 3.8 MB. It is built in the server's event loop, in which the tokens
of all other requests arrive, and parsed in the controller's."""

import asyncio
import copy
import inspect
import os
import secrets
from collections.abc import AsyncIterator
from itertools import chain
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import Body, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.entrypoints.rl.online.api_router import engine_client, router
from vllm.entrypoints.rl.online.metrics import weight_operation_metrics
from vllm.entrypoints.scale_out.token_in_token_out import api_router as upstream
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.outputs import CompletionOutput, RequestOutput

from megatron_r1.push.results import IncompletePush, UndeliveredPush

SECRET = "VLLM_API_KEY"
"""Environment variable. vLLM's own, so that both checks use one secret."""
OPEN_PATHS = ("/health",)


class SecretMiddleware:
    """ASGI middleware: 401 for requests, except to `OPEN_PATHS`, without `Authorization: Bearer
    SECRET`; websockets are closed."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ[SECRET]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass an authorized request on; answer 401 to others, 1008 to a websocket."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._is_authorized(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = b"this engine belongs to a run: requests need its secret\n"
            await send({"type": "http.response.body", "body": body})

    def _is_authorized(self, scope: dict[str, Any]) -> bool:
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(authorization, self.expected)


CORE_ENDED = "core_ended"
STATUS_OF_FAILURE = {CORE_ENDED: 500, IncompletePush.CODE: 500, UndeliveredPush.CODE: 409}
"""HTTP status of each "kind" of failure. Below 500: another engine would do no better."""
DEATH_SECONDS = 0.5
"""The pause between two checks whether the core is still alive."""


async def swap_weights(
    request: Request,
    update_info: Annotated[dict[str, Any] | list[dict[str, Any]], Body()],
    weight_version: Annotated[str, Body()],
    resume: Annotated[bool, Body()] = True,
) -> JSONResponse:
    """Swap as `_swap` does. Where the engine's core ends meanwhile, reply so at once: vLLM's call
    to it never returns then, and its server, which waits for open calls, does not end.

    Args:
        request: the HTTP request, whose app has the engine.
        update_info: the fields of a `PushUpdateInfo`, alone or in a list.
        weight_version: the version that the loaded weights get.
        resume: whether generation continues after the swap."""
    engine = engine_client(request)
    swap = asyncio.ensure_future(_swap(engine, update_info, weight_version, resume))
    while not swap.done():
        await asyncio.wait({swap}, timeout=DEATH_SECONDS)
        if engine.errored and not swap.done():
            swap.cancel()
            return _failed(CORE_ENDED, "the engine's core has ended in the middle of a push")
    return swap.result()


async def _swap(
    engine: Any,
    update_info: dict[str, Any] | list[dict[str, Any]],
    weight_version: str,
    resume: bool,
) -> JSONResponse:
    """Pause with requests in flight, have the backend load the received weights, set
    `weight_version`, drop all keys and values, and resume, if asked to. After an error the engine
    stays paused; "kind" in the reply's body is a key of `STATUS` where it is one of these.

    Without `reset_running_requests` vLLM keeps the whole cache while any sequence is in flight: new
    groups would then attend to keys of the weights before.

    Args:
        engine: vLLM's engine client.
        update_info: the fields of a `PushUpdateInfo`, alone or in a list.
        weight_version: the version of the received weights.
        resume: whether requests go on at once."""
    # Returns when no step is under way. The engine stamps tokens with their version, so it does not
    # matter when their receiver gets them.
    await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
    with weight_operation_metrics().record("update"):
        await engine.start_weight_update()
        try:
            await engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        except Exception as error:  # of another process, whose class is lost
            for kind in STATUS_OF_FAILURE:
                if kind in str(error):
                    return _failed(kind, str(error).partition(f"{kind}: ")[2])
            raise
        await engine.finish_weight_update(weight_version)
    if not await engine.reset_prefix_cache(reset_running_requests=True):
        raise RuntimeError("the prefix cache was not reset")
    if resume:
        await engine.resume_generation()
    return JSONResponse({"weight_version": weight_version})


def _failed(kind: str, error: str) -> JSONResponse:
    return JSONResponse({"kind": kind, "error": error}, status_code=STATUS_OF_FAILURE[kind])


def add_swap() -> None:
    """Add the endpoint to the server that this process will start."""
    router.post("/swap_weights")(swap_weights)


MEDIA_TYPE = "application/x-megatron-r1-samples"

_generate_json = inspect.unwrap(upstream.generate)


@with_cancellation
@load_aware_call
async def generate(request: GenerateRequest, raw_request: Request) -> Response:
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
    return StreamingResponse(_chunks(output.outputs, has_top_k), media_type=MEDIA_TYPE)


async def _last_output(request: object, outputs: AsyncIterator[Any], *_: object) -> Any:
    """Return what the engine gives last, in the place of the handler's
    `serve_tokens_full_generator`, which makes the JSON of it."""
    last = None
    async for output in outputs:
        last = output
    return last


async def _chunks(choices: list[CompletionOutput], has_top_k: bool) -> AsyncIterator[bytes]:
    routed = [choice.routed_experts for choice in choices]
    masks = [_mask(choice) if has_top_k else None for choice in choices]
    described = [
        {
            "finish_reason": choice.finish_reason or "stop",
            "num_tokens": len(choice.token_ids),
            "weight_versions": choice.weight_versions or [],
            "routed_experts": None if rows is None else _described(rows),
            "sampling_mask": None if mask is None else len(mask),
        }
        for choice, rows, mask in zip(choices, routed, masks, strict=True)
    ]
    header = msgspec.json.encode({"choices": described})
    yield len(header).to_bytes(4, "little") + header
    for choice, mask in zip(choices, masks, strict=True):
        ids = np.array(choice.token_ids, "<i4")
        yield ids.tobytes() + _logprobs(choice, ids).tobytes() + (mask or b"")
    for rows in routed:
        if rows is not None:
            yield np.ascontiguousarray(rows).tobytes()


def _mask(choice: CompletionOutput) -> bytes | None:
    """Return the kept ids of every token in the form of `models.sampling_mask`: counts, then ids,
    int32; None where the engine returns none."""
    if choice.sampling_mask is None:
        return None
    kept_ids = choice.sampling_mask.token_ids
    counts = np.array([len(ids) for ids in kept_ids], "<i4")
    return counts.tobytes() + np.fromiter(chain.from_iterable(kept_ids), "<i4").tobytes()


def _described(rows: np.ndarray) -> dict[str, Any]:
    return {"dtype": rows.dtype.str, "shape": rows.shape}


def _logprobs(choice: CompletionOutput, ids: np.ndarray) -> np.ndarray:
    """Return the sampled tokens' log-probabilities; NaN, which clients refuse, for a token that the
    engine gives none for."""
    flat: Any = choice.logprobs
    first = np.array(flat.start_indices, int)[: len(ids)]
    logprobs = np.array(flat.logprobs, "<f4")[first]
    return np.where(np.array(flat.token_ids, "<i4")[first] == ids, logprobs, np.float32(np.nan))


def add_samples() -> None:
    """Put the endpoint before vLLM's, in the server that this process will start."""
    checks = [Depends(validate_json_request)]
    upstream.router.add_api_route(
        "/inference/v1/generate",
        generate,
        methods=["POST"],
        dependencies=checks,
        response_model=None,
    )
    routes = upstream.router.routes
    routes.insert(0, routes.pop())
