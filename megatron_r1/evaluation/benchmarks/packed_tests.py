"""Reads the test cases of LiveCodeBench's rows, and runs nothing that is in them.

Private tests are base64 of zlib of a pickle of JSON text, read without unpickling: unpickling a
downloaded file may run code from it. Only pickles whose instructions build plain texts, numbers,
lists and mappings are accepted; they are checked before anything is built."""

import base64
import binascii
import io
import json
import pickle
import pickletools
import zlib
from typing import Any

from r1_grading.base.errors import shorten

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
FILE_REMEDY = "download the file again, or remove the row"


class _PlainUnpickler(pickle.Unpickler):
    """A second check: no class or function is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it refers to {module}.{name}")


def decode_tests(packed_tests: str, location: str) -> list[dict[str, Any]]:
    """Return the test cases of a row; nothing in them is ever executed.

    Args:
        packed_tests: JSON text, plain or as packed by the data set.
        location: where the row is, for errors.

    Raises:
        UserError: anything else."""
    try:
        tests = (
            json.loads(packed_tests)
            if packed_tests.lstrip()[:1] in ("[", "{")
            else _unpack_tests(packed_tests)
        )
        if isinstance(tests, str):
            tests = json.loads(tests)
    except (ValueError, TypeError, binascii.Error, zlib.error, pickle.UnpicklingError) as error:
        raise UserError(
            f"{location}: its tests cannot be read: {error}; they begin "
            f"{shorten(packed_tests, 40)}: {FILE_REMEDY}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        ) from error
    except (EOFError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{location}: its tests are damaged: {error!r}; they begin "
            f"{shorten(packed_tests, 40)}: {FILE_REMEDY}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        ) from error
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise UserError(
            f"{location}: its tests must be a list of objects, got {type(tests).__name__}; "
            f"{FILE_REMEDY}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        )
    return tests


def _unpack_tests(packed_tests: str) -> Any:
    inflater = zlib.decompressobj()
    content = inflater.decompress(base64.b64decode(packed_tests, validate=True), MAX_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"more than {MAX_BYTES:,} bytes when unpacked")
    # The C unpickler allocates memory for the largest memo index, so the indices are bounded.
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in PLAIN_OPCODES:
            raise ValueError(f"its pickle holds {opcode.name}, which plain data does not need")
        if opcode.name in MEMO_OPCODES and int(argument or 0) > number:
            raise ValueError(f"its pickle's memo index {argument} is too large")
    return _PlainUnpickler(io.BytesIO(content)).load()
