"""What the controller sends to engines for a push, and what ranks report to it.

To engines: JSON in vLLM's calls of its weight-transfer API, whose backend
(`engines.plugin.backend`) decodes the same classes. From ranks: the results of the trainer ranks'
operations (`rank_push.RankPush`), and the errors of engine ranks.

Imports no torch, because the controller imports it, and no llvmlite: where vLLM's server imports
that before it forks its engine core, vLLM 0.32 does not start. triton_utils/dispatcher.py:143 looks
into `__dict__` of every module's attributes, and that of llvmlite's library is no dictionary."""

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


class OpenedPush(msgspec.Struct, frozen=True):
    """What every rank returns from "open_push": where the ranks meet.

    Attributes:
        store: host and port of the store that rank 0 hosts for trainer and engines."""

    store: tuple[str, int]


class ConnectedSets(msgspec.Struct, frozen=True):
    """What a rank returns from "connect_sets": its part in pushes to each set of engines.

    Attributes:
        problems: set -> why this rank cannot connect to it. The other fields are of the other sets.
        num_links: set -> links of this rank to it.
        num_bytes: set -> bytes that this rank sends to it per push."""

    problems: dict[str, str]
    num_links: dict[str, int]
    num_bytes: dict[str, int]


class EngineSetFailure(msgspec.Struct, frozen=True):
    """Why a set can push no more.

    Attributes:
        error: what failed, as a sentence for the user.
        members: the engines at fault, by their number in the set, as far as known.
        is_damaged: bytes arrived otherwise than they were sent.
    """

    error: str
    members: list[int] = []
    is_damaged: bool = False


class SentWeights(msgspec.Struct, frozen=True):
    """The result of "send_weights".

    Attributes:
        failures: set -> why it can push no more."""

    failures: dict[str, EngineSetFailure]


class PushError(ValueError):
    """An error of a push.

    vLLM passes errors between its processes as text (v1/engine/core.py:1751 and, from the ranks,
    v1/executor/multiproc_executor.py:1004), so the text has `CODE`, by which
    `engines.plugin.weight_swap` recognizes it."""

    CODE: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"{self.CODE}: {reason}")


class IncompletePush(PushError):
    """The push is incomplete; the engine still uses the old weights."""

    CODE = "incomplete_push"


class StoreUnreachable(PushError):
    """An engine rank cannot connect to the trainer's store, where all ranks of a set meet."""

    CODE = "store_unreachable"


class UnusedPush(PushError):
    """A push arrived, and the engine computes with something else."""

    CODE = "undelivered_push"
