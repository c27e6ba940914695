"""The engine's answer to "which experts": base64 of an .npy array → bytes of the MoE layers.

vLLM gives a row per token that passed through the model: all of prompt and response but the last
token, which was sampled and never fed. A row has every decoder layer, dense ones left at 0
(entrypoints/scale_out/token_in_token_out/protocol.py:407, vLLM 0.32).
"""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np

from megatron_r1.models.routing_shape import RoutingShape


def decode_routing(text: str | None, shape: RoutingShape, num_tokens: int) -> bytes:
    """Indices [num_tokens - 1, moe layers, topk], each of shape.index_bytes bytes.

    num_tokens: of prompt and response.

    Raises:
        ValueError: says what is wrong with the answer, or that there is none.
    """
    if text is None:
        raise ValueError(
            "the engine returned no routed experts; start it with --enable-return-routed-experts, "
            "or set rl.routing_replay: false"
        )
    try:
        rows = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    except (binascii.Error, EOFError, ValueError) as error:
        raise ValueError(f"routed experts are no .npy array in base64: {error}") from None
    expected = (num_tokens - 1, shape.num_layers, shape.topk)
    if rows.shape != expected:
        raise ValueError(
            f"routed experts have shape {list(rows.shape)}, but {list(expected)} (tokens - 1, "
            "layers, topk) belong to this answer of this model"
        )
    rows = rows[:, list(shape.moe_layers)]
    if rows.size and int(rows.max()) >= shape.num_experts:
        raise ValueError(f"routed expert {rows.max()}, but there are {shape.num_experts}")
    if shape.topk > 1 and (rows[..., 0] == rows[..., 1]).any():
        token, layer = np.argwhere(rows[..., 0] == rows[..., 1])[0]
        raise ValueError(
            f"token {token} has expert {rows[token, layer, 0]} twice in layer "
            f"{shape.moe_layers[layer]}: the engine did not record that layer"
        )
    return np.ascontiguousarray(rows, f"<u{shape.index_bytes}").tobytes()
