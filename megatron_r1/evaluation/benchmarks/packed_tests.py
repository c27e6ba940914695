"""LiveCodeBench's private tests: base64 of zlib of a pickle of JSON text, read without unpickling.

Unpickling a downloaded file may run code from it. Only pickles whose instructions build plain
texts, numbers, lists and mappings are accepted; they are checked before anything is built."""

import base64
import binascii
import io
import json
import pickle
import pickletools
import zlib
from typing import Any

from megatron_r1.base.errors import Cause, UserError

MAX_BYTES = 2**30
"""Unpacked size of one problem's tests: the largest known is under 100 MB."""
PLAIN_OPCODES = frozenset(
    ("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
    + ("GET", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE")
    + ("INT", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT")
    + ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
    + ("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS")
    + ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
)
MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")


class _PlainUnpickler(pickle.Unpickler):
    """A second check: no class or function is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it refers to {module}.{name}")


def decode_tests(packed: str, place: str) -> list[dict[str, Any]]:
    """Return the test cases in `packed`: JSON text, plain or as packed by the data set. Raises
    UserError with `place` for anything else; nothing in `packed` is ever executed."""
    try:
        tests = json.loads(packed) if packed.lstrip()[:1] in ("[", "{") else _unpack(packed)
        if isinstance(tests, str):
            tests = json.loads(tests)
    except (ValueError, TypeError, binascii.Error, zlib.error, pickle.UnpicklingError) as error:
        raise UserError(
            f"{place}: its private tests cannot be read: {error}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        ) from error
    except (EOFError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{place}: its private tests are damaged: {error}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        ) from error
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise UserError(
            f"{place}: its private tests are not a list of test cases",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        )
    return tests


def _unpack(packed: str) -> Any:
    inflater = zlib.decompressobj()
    content = inflater.decompress(base64.b64decode(packed, validate=True), MAX_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"more than {MAX_BYTES:,} bytes when unpacked")
    # The C unpickler allocates memory for the largest memo index, so the indices are bounded.
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in PLAIN_OPCODES:
            raise ValueError(f"its pickle holds {opcode.name}, which plain data does not need")
        if opcode.name in MEMO_OPCODES and int(argument or 0) > number:
            raise ValueError(f"its pickle's memo index {argument} is too large")
    return _PlainUnpickler(io.BytesIO(content)).load()
