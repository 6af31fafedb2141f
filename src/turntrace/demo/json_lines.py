"""Reading JSON that others wrote: strictly, and without what no database and no wire takes."""

import json
import re
from typing import Any, Final

from turntrace.errors import TranscriptError

_BOM: Final = b"\xef\xbb\xbf"
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def value_of(raw: bytes) -> Any:
    """Read a line of JSON Lines (https://jsonlines.org).

    Halves of surrogate pairs become replacement characters, and whole numbers of 19 digits and more become floats.

    Raises:
        TranscriptError: If it is not UTF-8 or not JSON, begins with a byte order mark, or has an object with the same
            key twice. The message never says what stands there.
        RecursionError: If it is nested too deeply.
    """
    if raw.startswith(_BOM):
        raise TranscriptError("it begins with a byte order mark, which JSON Lines has not: save it as plain UTF-8")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise TranscriptError(f"it is not UTF-8: byte {error.start + 1} cannot be read") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_int=_number)
    except json.JSONDecodeError as error:
        raise TranscriptError(f"it is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    return _whole(value) if _SURROGATE.search(text) else value


def arguments_of(text: str) -> dict[str, Any]:
    """Return the arguments of a call of a tool; what is no JSON object (models write such) is one argument."""
    try:
        value = json.loads(text, parse_int=_number)
    except (ValueError, RecursionError):
        value = None
    return _whole(value) if isinstance(value, dict) else {"arguments": text}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise TranscriptError("it is not JSON that can be read: an object has the same key twice")
    return value


def _no_number(name: str) -> Any:
    raise TranscriptError(f"it is not JSON: {name} is no number of JSON")


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(part) for part in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(part) for name, part in value.items()}
    return value
