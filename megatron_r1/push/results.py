"""What ranks report to the controller of a push: the results of the trainer ranks' operations
(`worker.PushWorker`), and the errors of engine ranks.

Imports no torch, because the controller imports it, and no llvmlite: where vLLM's server imports
that before it forks its engine core, vLLM 0.32 does not start. triton_utils/dispatcher.py:143 looks
into `__dict__` of every module's attributes, and that of llvmlite's library is no dictionary."""

import msgspec


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


class SetFailure(msgspec.Struct, frozen=True):
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
        problems: set -> why it can push no more."""

    problems: dict[str, SetFailure]


class PushError(ValueError):
    """An error of a push. vLLM passes errors between its processes as text (v1/engine/core.py:1751
    and, from the ranks, v1/executor/multiproc_executor.py:1004), so the text has `CODE`, by which
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


class UndeliveredPush(PushError):
    """A push arrived, and the engine computes with something else."""

    CODE = "undelivered_push"
