"""One secret of a run: whoever knows it may join as a trainer rank or an engine host.

ZeroMQ's CURVE (curvezmq.org) authenticates and encrypts: a peer that does not know the server's
public key cannot shake hands, and here that key is derived from the token instead of published.
Costs about two thirds of a plain socket's bandwidth; a step sends megabytes.
"""

from __future__ import annotations

import os
import secrets
from hashlib import blake2b
from pathlib import Path

import zmq
from zmq.utils import z85

ENVIRONMENT = "MEGATRON_R1_TOKEN"
FILE = "token"
RANKS_ENVIRONMENT = "MEGATRON_R1_RANK_TOKEN"
"""Another secret, of trainer ranks only: made at every start by what starts them, and handed on."""
OTHERS = 0o077  # permission bits of everybody but the owner


def make_token(folder: str | os.PathLike[str]) -> str:
    """For the controller: MEGATRON_R1_TOKEN, else the file `token` in the run's folder, which is
    made where it is missing. Raises ValueError as `known_token`."""
    path = Path(folder) / FILE
    if not os.environ.get(ENVIRONMENT) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f".{FILE}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        made.rename(path)
    return known_token(path)


def known_token(path: str | os.PathLike[str] | None) -> str:
    """MEGATRON_R1_TOKEN, else what the file says.

    Raises:
        ValueError: no such file, or it is empty, or readable by others.
    """
    if given := os.environ.get(ENVIRONMENT):
        return given
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"no token of the run: set {ENVIRONMENT} to the content of the file `{FILE}` in its "
            f"folder{f' ({path} is no file)' if path else ''}"
        )
    path = Path(path)
    if path.stat().st_mode & OTHERS:
        raise ValueError(f"token file {path} can be read by others: chmod 600 {path}")
    token = path.read_text(encoding="ascii").strip()
    if not token:
        raise ValueError(f"token file {path} is empty: delete it, and the run makes a new one")
    return token


def protect_server(socket: zmq.Socket, token: str) -> None:
    """Let only holders of `token` connect; call before `bind`."""
    socket.curve_secretkey = _server_secret(token)
    socket.curve_server = True


def protect_client(socket: zmq.Socket, token: str) -> None:
    """Connect as a holder of `token`; call before `connect`."""
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = zmq.curve_public(_server_secret(token))


def _server_secret(token: str) -> bytes:
    """A Curve25519 secret key (any 32 bytes are one), in ZeroMQ's Z85 letters."""
    return z85.encode(blake2b(token.encode(), digest_size=32, person=b"megatron-r1 zmq").digest())
