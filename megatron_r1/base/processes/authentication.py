"""One secret of a run: only its holders may join as a trainer rank or an engine host.

ZeroMQ's CURVE (curvezmq.org) authenticates and encrypts: a peer without the server's
public key cannot shake hands, and here that key is derived from the token instead of published.
It leaves 122 of a plain socket's 409 MiB/s (docs/learned.md); a step sends megabytes."""

import os
import secrets
from hashlib import blake2b
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write

TOKEN_VARIABLE = "MEGATRON_R1_TOKEN"
TOKEN_FILE = "token"
RANKS_TOKEN_VARIABLE = "MEGATRON_R1_RANK_TOKEN"
"""Another secret, of trainer ranks only: made at every start by the process that starts them."""
NOT_OWNER = 0o077  # permission bits of everybody but the owner


def make_token(folder: str | os.PathLike[str]) -> str:
    """Return MEGATRON_R1_TOKEN, or the token in the run's folder, which is made if it is missing.
    For the controller.

    Raises:
        UserError: the file is empty, or readable by others.
    """
    path = Path(folder) / TOKEN_FILE
    if not os.environ.get(TOKEN_VARIABLE) and not path.exists():
        atomic_write(path, secrets.token_hex(32), mode=0o600)
    return known_token(path)


def known_token(path: str | os.PathLike[str] | None) -> str:
    """Return MEGATRON_R1_TOKEN, or the file's content.

    Raises:
        UserError: there is no such file, or it is empty, or readable by others.
    """
    if token := os.environ.get(TOKEN_VARIABLE):
        return token
    if path is None or not Path(path).is_file():
        raise UserError(
            f"no token of the run: set {TOKEN_VARIABLE} to the content of the file `{TOKEN_FILE}` "
            f"in its folder{f' ({path} is no file)' if path else ''}",
            key=TOKEN_VARIABLE,
            cause=Cause.MISSING,
        )
    path = Path(path)
    if path.stat().st_mode & NOT_OWNER:
        raise UserError(
            f"token file {path} can be read by others: chmod 600 {path}",
            key=TOKEN_FILE,
            cause=Cause.OUT_OF_RANGE,
        )
    token = path.read_text(encoding="ascii").strip()
    if not token:
        raise UserError(
            f"token file {path} is empty: delete it, and the run makes a new one",
            key=TOKEN_FILE,
            cause=Cause.EMPTY,
        )
    return token


def protect_server(socket: zmq.Socket[Any], token: str) -> None:
    """Let only holders of `token` connect; call before `bind`."""
    socket.curve_secretkey = _server_secret(token)
    socket.curve_server = True


def protect_client(socket: zmq.Socket[Any], token: str) -> None:
    """Connect as a holder of `token`; call before `connect`."""
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = zmq.curve_public(_server_secret(token))


def _server_secret(token: str) -> bytes:
    """Return a Curve25519 secret key (any 32 bytes are one), in ZeroMQ's Z85 letters."""
    return z85.encode(blake2b(token.encode(), digest_size=32, person=b"megatron-r1 zmq").digest())
