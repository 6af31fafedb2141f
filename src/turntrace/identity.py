"""Ids: making them, checking them, and hashing those of users."""

import hashlib
import hmac
import os
import random
import re
import secrets
from typing import Final
from uuid import UUID

from turntrace.errors import IdentityError

MAX_ID_LENGTH: Final = 200
"""Longest id of a session or a user that Langfuse takes, in characters."""

_HASH_PREFIX: Final = "sha256-"
_ALLOWED = re.compile(r"[\x20-\x7e]{1,200}")


# Random enough for ids, and without the system call of `secrets`, at which another thread may take the interpreter.
# A generator of our own: an app that seeds Python's shared one would otherwise make the same ids in each of its runs.
_random = random.Random(secrets.token_bytes(32))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _random.seed(secrets.token_bytes(32)))


def new_id() -> str:
    """Return a random id of 32 hexadecimal digits.

    The id of a turn is at the same time the id of its trace, so it has the form of one (W3C Trace Context: 16 bytes,
    not all zero).
    """
    return f"{_random.getrandbits(128) or 1:032x}"


def new_span_id() -> str:
    """Return a random id of 16 hexadecimal digits, for a span."""
    return f"{_random.getrandbits(64) or 1:016x}"


def derived_id(*parts: str) -> str:
    """Return the id of 32 hexadecimal digits that always stands for these parts.

    Args:
        parts: What the id derives from; their order and boundaries count.
    """
    digest = hashlib.sha256("\x1f".join(f"{len(part)}:{part}" for part in parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def time_of_checkpoint(checkpoint_id: str) -> int | None:
    """Return when a checkpoint of LangGraph's was made, in nanoseconds since 1970; None for an id that does not tell.

    Its ids are UUIDs of version 6 (RFC 9562), which begin with the time in units of 100 ns since October 1582.
    """
    try:
        found = UUID(checkpoint_id)
    except ValueError:
        return None
    if found.version != 6:
        return None
    units = (found.int >> 80) << 12 | (found.int >> 64) & 0xFFF
    return (units - 0x01B21DD213814000) * 100


def is_trace_id(value: str) -> bool:
    """Tell whether an id has the form of a W3C trace id: 32 lower-case hexadecimal digits, not all zero."""
    return len(value) == 32 and set(value) <= set("0123456789abcdef") and value.strip("0") != ""


def check_id(value: object, name: str) -> str:
    """Return an id that the app gave, or say why it cannot be one.

    Langfuse takes ids of US-ASCII with at most 200 characters and drops others without an error, so they are refused
    here.

    Args:
        value: The id as given.
        name: What it is the id of, for the message: ``session_id``, ``conversation_id``, ...

    Returns:
        The id as a string.

    Raises:
        IdentityError: If it is not a string or number, empty, longer than 200 characters, or has characters outside
            printable US-ASCII.
    """
    text = as_text(value, name)
    if _ALLOWED.fullmatch(text):
        return text
    if not text:
        why = "it is empty"
    elif len(text) > MAX_ID_LENGTH:
        why = f"it has {len(text)} characters"
    else:
        position = next(i for i, character in enumerate(text) if not " " <= character <= "~")
        why = f"its character {position + 1} is U+{ord(text[position]):04X}"
    raise IdentityError(
        f"{name} cannot be used: {why}. Allowed are 1 to {MAX_ID_LENGTH} printable US-ASCII characters "
        f"(Langfuse drops other ids). Pass an ASCII id, or turntrace.identity.safe_id(value) for a hash of it."
    )


def check_text(value: object, name: str) -> str:
    """Return a short text that the app gave (a topic, a channel, a reason), or say why it cannot be one.

    Args:
        value: The text as given.
        name: What it is, for the message.

    Raises:
        IdentityError: If it is not a string or number, empty, longer than 200 characters, or has characters that
            UTF-8 or a database cannot hold.
    """
    text = as_text(value, name)
    if not 1 <= len(text) <= MAX_ID_LENGTH:
        raise IdentityError(f"{name} has {len(text)} characters. Allowed are 1 to {MAX_ID_LENGTH}: pass a shorter one.")
    if text != safe_text(text):
        raise IdentityError(
            f"{name} has a character that cannot be kept. Allowed are all but lone surrogates and U+0000. "
            "Pass turntrace.identity.safe_text(value), which replaces it."
        )
    return text


def safe_text(value: object) -> str:
    """Return a short text that can be kept: at most 200 characters, what UTF-8 or a database cannot hold replaced."""
    text = str(value)[:MAX_ID_LENGTH].replace("\x00", "\ufffd")
    return text.encode("utf-8", "replace").decode("utf-8")


def safe_id(value: object, name: str = "id") -> str:
    """Return an id that Langfuse takes: the given one, or where that cannot be used, a hash that stands for it.

    Args:
        value: The id as given, a string or a number.
        name: What it is the id of, for the message.

    Raises:
        IdentityError: If it is empty or not a string or number.
    """
    text = as_text(value, name)
    if not text:
        raise IdentityError(f"{name} is empty. Pass a string of 1 to {MAX_ID_LENGTH} printable US-ASCII characters.")
    if _ALLOWED.fullmatch(text):
        return text
    return _HASH_PREFIX + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:48]


def hash_user(user_id: object, key: bytes) -> str:
    """Return what stands for a user everywhere outside the app: HMAC-SHA256 of the user's id, in hexadecimal.

    Args:
        user_id: The raw id, a string or a number. It is not kept.
        key: The secret key; without it nobody can test whether a hash is that of a known user.

    Raises:
        IdentityError: If the id is empty or not a string or number.
    """
    text = as_text(user_id, "user_id")
    if not text:
        raise IdentityError("user_id is empty. Pass the id of the user, or None for an unknown one.")
    return hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256").hex()


def new_hash_key() -> bytes:
    """Return a random key for `hash_user`, of 32 bytes."""
    return secrets.token_bytes(32)


def as_text(value: object, name: str) -> str:
    """Return an id as the text that it is.

    Args:
        value: The id as given: a string, a number or a UUID.
        name: What it is the id of, for the message.

    Raises:
        IdentityError: If it is none of these.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, UUID):
        return str(value)
    raise IdentityError(
        f"{name} is a {type(value).__name__}. Allowed is a string, an int or a UUID. Pass str(value) if that names it."
    )
