"""The failure of a set, as the rank that noticed it publishes it for all others."""

import msgspec


class Failure(msgspec.Struct, frozen=True):
    """Why a set can push no more.

    members: the engines at fault, by their number in the set, as far as known. is_damaged: bytes
    arrived otherwise than they were sent."""

    error: str
    members: list[int] = []
    is_damaged: bool = False


class SetFailed(ConnectionError):
    """Another rank of the set, or the controller, has reported `failure`."""

    def __init__(self, failure: Failure):
        super().__init__(failure.error)
        self.failure = failure


def encode_failure(failure: Failure) -> str:
    """Return the failure as it is in the store: JSON, because `compare_set` takes text."""
    return msgspec.json.encode(failure).decode()


def decode_failure(encoded: bytes) -> Failure:
    """Return the failure that is in the store."""
    return msgspec.json.decode(encoded, type=Failure)
