"""What the controller sends to engines for a push: JSON in vLLM's calls of its weight-transfer API,
whose backend (`engines.plugin.backend`) decodes the same classes.

Imports no torch, because the controller imports it."""

from typing import Any

import msgspec


class AdapterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine needs to serve pushed factors as an adapter.

    Attributes:
        prefix: what precedes the names of the factors in PEFT's files.
        config: PEFT's `adapter_config.json`."""

    prefix: str
    config: dict[str, Any]


class PushInitInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments with which an engine connects to the trainer's ranks.

    Attributes:
        store: host and port of the trainer's store.
        name: the set of equal engines that are connected together, unique to this connection.
        tensors: name and shape of every tensor of the checkpoint.
        member_index: this engine's number in the set.
        num_members: engines of the set.
        timeout_seconds: time limit for the trainer to connect.
        push_timeout_seconds: time limit of a push.
        allocates_per_push: whether the memory of weights in transit has another use between pushes.
        adapter: its settings where the tensors are an adapter's, else None."""

    store: tuple[str, int]
    name: str
    tensors: list[tuple[str, tuple[int, ...]]]
    member_index: int = 0
    num_members: int = 1
    timeout_seconds: float = 600.0
    push_timeout_seconds: float = 600.0
    allocates_per_push: bool = False
    adapter: AdapterSettings | None = None


class PushUpdateInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The push that an engine is to load.

    Attributes:
        push_number: its number, one more than that of the engine's last push.
        timeout_seconds: time limit for all of the push to arrive."""

    push_number: int
    timeout_seconds: float = 600.0
