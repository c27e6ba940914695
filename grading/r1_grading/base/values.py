"""Values as texts: settings as they are written, and lists and mappings of data sets.

Settings are numbers, truth values and text; data sets store lists and mappings as JSON, which has
no NaN and no infinity (`find_non_finite`), or as Python's literals.

Every reader of settings takes the same spellings. YAML 1.1 takes `1e-6` for text, `010` for 8 and
`1:30` for 90. Here a number is decimal: digits, which `_` may divide, a point, an exponent. `true`,
`yes` and `on` are true. A setting that is a number or a truth value may stand in quotes; one that
is text takes neither without quotes."""

import ast
import json
import math
import re
import types
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationInfo

from r1_grading.base.errors import Cause, UserError

INTEGER = r"[-+]?(?:0|[1-9][0-9_]*)"
FRACTION = r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
INFINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
"""Regular expressions of numbers, as they are written; the last one is refused wherever it is
read."""
TRUTH_VALUE_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
}
_BASES = {"0x": 16, "0o": 8, "0b": 2}
_NUMBER = re.compile(FRACTION)
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_field(model: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Return the value given for a field of `model`, as `read_as`.

    For a validator of all fields, before their own.

    Args:
        model: the model that has the field.
        value: the value as it was written.
        info: names the field.

    Raises:
        UserError: the value is not of the field's type; its key is the field, or the entry within
            it."""
    name = str(info.field_name)
    try:
        return read_as(value, model.model_fields[name].annotation)
    except _EntryError as error:
        # The key is relative to the field, as those of sections within it are.
        raise UserError(f"{error.key}: {error}", key=error.key, cause=Cause.MALFORMED) from None
    except ValueError as error:
        raise UserError(str(error), key=name, cause=Cause.MALFORMED) from None


class _EntryError(ValueError):
    """A wrong entry of a list or mapping; key: of the entry, dotted."""

    def __init__(self, key: object, error: ValueError) -> None:
        super().__init__(str(error))
        inner_key = f".{error.key}" if isinstance(error, _EntryError) else ""
        self.key: str = f"{key}{inner_key}"


def read_as(value: Any, annotation: Any) -> Any:
    """Return a setting as its type wants it, also within lists and mappings.

    Text that is a number becomes a number, a whole float an int, a word a truth value; anything
    else stays as it is.

    Args:
        value: the setting as it was written.
        annotation: the type of the setting.

    Raises:
        ValueError: with the right spelling, for a truth value where a number is wanted, or the
            reverse, for either where text is wanted, and for a number in another spelling."""
    kinds = list(_union_members(annotation))
    if isinstance(value, dict | list):
        for kind in kinds:
            origin, parts = get_origin(kind), get_args(kind)
            if isinstance(value, dict) and origin is dict:
                return {key: _read_entry(key, item, parts[1]) for key, item in value.items()}
            if isinstance(value, list) and origin in (list, set, frozenset):
                return [_read_entry(index, item, parts[0]) for index, item in enumerate(value)]
        return value
    if not isinstance(value, bool | int | float | str):
        return value
    if any(value in get_args(kind) for kind in kinds if get_origin(kind) is Literal):
        return value
    scalars = [kind for kind in kinds if kind in (bool, int, float, str)]
    non_scalars = [kind for kind in kinds if kind not in (bool, int, float, types.NoneType)]
    # Another type has its own reading of text, and a choice of words names the right ones.
    if not scalars or (isinstance(value, str) and non_scalars):
        return value
    return read_scalar(value, scalars)


def _read_entry(key: object, value: Any, annotation: Any) -> Any:
    try:
        return read_as(value, annotation)
    except ValueError as error:
        raise _EntryError(key, error) from None


def read_scalar(value: Any, kinds: Collection[type]) -> Any:
    """Return a scalar as one of `kinds`, of bool, int, float and str.

    Errors as `read_as`, and for what is no scalar."""
    if type(value) is bool and bool not in kinds:
        if str in kinds:
            raise ValueError(f"must be text, got {value}; put it in quotes")
        raise ValueError(
            f"must be a number, got {str(value).lower()} (yes, no, on and off are truth values)"
        )
    if type(value) in (int, float):
        if float in kinds or (int in kinds and value == value // 1):
            return value if float in kinds else int(value)
        if int in kinds:
            raise ValueError(f"must be a whole number, got {value}")
        if str in kinds:
            raise ValueError(f"must be text, got the number {value}; put it in quotes")
        raise ValueError(f"must be true or false, got {value}")
    if isinstance(value, str) and str not in kinds:
        return _read_text(value.strip(), kinds)
    if type(value) not in kinds:
        raise ValueError(
            f"must be {' or '.join(_TYPE_NAMES[kind] for kind in kinds)}, got {value!r}"
        )
    return value


def _read_text(text: str, kinds: Collection[type]) -> Any:
    if bool in kinds and text.lower() in TRUTH_VALUE_WORDS:
        return TRUTH_VALUE_WORDS[text.lower()]
    if not {int, float} & set(kinds):
        raise ValueError(f"must be true or false, got {text!r}")
    if _NUMBER.fullmatch(text):
        digits = text.replace("_", "")
        is_integer = re.fullmatch(INTEGER, text)
        return read_scalar(int(digits) if is_integer else float(digits), kinds)
    suggestion = _plain_spelling(text)
    raise ValueError(
        f"must be a number, got {text!r}" + (f"; write {suggestion}" if suggestion else "")
    )


def _plain_spelling(text: str) -> str:
    """Return a number in another spelling as it is written here, or ""."""
    sign = text[:1] if text[:1] in "+-" else ""
    digits = text[len(sign) :].lower()
    if base := _BASES.get(digits[:2]):
        try:
            return f"{sign}{int(digits, base)}"
        except ValueError:
            return ""
    if digits.endswith("%") and _NUMBER.fullmatch(digits[:-1]):
        return f"{sign}{float(digits[:-1]) / 100:g}"
    for number in (digits.lstrip("0"), digits.replace(",", ".", 1)):
        if number != digits and _NUMBER.fullmatch(number):
            return f"{sign}0{number}" if number.startswith(".") else sign + number
    return ""


def _union_members(annotation: Any) -> Any:
    """Yield the types of a union, without their annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _union_members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _union_members(part)
    else:
        yield annotation


MAX_DIGITS = 100_000
MAX_LITERAL_CHARS = 1_000_000
"""A longer text that is no JSON is not read as Python, whose parser takes many times its size."""
PYTHON_STARTS = ("{'", "['", "[{'", "[['", "[('", '[("')
"""How the text of a Python value begins that is no JSON."""


def decode_literal(value: Any) -> Any:
    """Return the list or mapping that a text is, as JSON or as a Python literal.

    Any other value is returned itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return _parse_literal(value)


def load_json(text: str | bytes) -> Any:
    """Return a JSON value, with integers of up to 100,000 digits.

    int() refuses more than 4,300, because it takes quadratic time."""
    return json.loads(text, parse_int=_parse_integer)


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits) if len(digits) <= 4_000 else int(Decimal(digits))


def _parse_literal(text: str) -> Any:
    if len(text) > MAX_LITERAL_CHARS or not text.lstrip().startswith(PYTHON_STARTS):
        return text
    try:
        literal = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return literal if isinstance(literal, list | dict) else text


def find_non_finite(value: object, path: str) -> str:
    """Return "truth.result is NaN" for a number in `value` that JSON does not have, or ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {'NaN' if math.isnan(value) else 'Infinity'}, which is no JSON number"
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return next(filter(None, (find_non_finite(item, f"{path}.{key}") for key, item in items)), "")
