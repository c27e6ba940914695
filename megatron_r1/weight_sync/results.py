"""The results of the operations of a push, as each trainer rank (`trainer_rank.WeightPush`) replies
to the controller. Imports no torch, because the controller imports it."""

from typing import TypedDict


class OpenedPush(TypedDict):
    """The result of "open_push"."""

    store: list
    """[host, port] of the store that rank 0 hosts for trainer and engines."""


class ConnectedSets(TypedDict):
    """The result of "connect_sets"."""

    problems: dict[str, str]
    """Set -> why this rank cannot connect to it. The other fields are of the other sets."""
    num_links: dict[str, int]
    """Set -> links of this rank to it."""
    num_bytes: dict[str, int]
    """Set -> bytes that this rank sends to it per push."""


class FailedSet(TypedDict):
    """The fields of a `rendezvous.failure.Failure`."""

    error: str
    members: list[int]
    is_damaged: bool


class SentWeights(TypedDict):
    """The result of "send_weights"."""

    problems: dict[str, FailedSet]
    """Set -> its failure."""
