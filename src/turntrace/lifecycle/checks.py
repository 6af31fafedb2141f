"""Checks of what a tracker is given."""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from opentelemetry import trace

from turntrace.boundary import caught
from turntrace.errors import ConfigurationError
from turntrace.identity import check_text, hash_user
from turntrace.settings import MAX_IDLE_S

if TYPE_CHECKING:
    from turntrace.ledger import Ledger

SESSION_TYPES: Final = ("chat", "api", "batch")

_HASHES_REMEMBERED: Final = 10_000
_YEAR_S: Final = 366 * 86_400.0
_LAST_NS: Final = 2**63 - 1 - int(MAX_IDLE_S * 1_000_000_000)
T = TypeVar("T")


class UserHasher:
    """Hashes user ids; remembers some, since hashing costs more than looking up.

    Args:
        key: The secret key.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._known: dict[str, str] = {}

    def __call__(self, user_id: str | int) -> str:
        """Return the hash that stands for a user."""
        known = self._known.get(user_id) if isinstance(user_id, str) else None
        if known is None:
            known = hash_user(user_id, self._key)
            if isinstance(user_id, str):
                if len(self._known) >= _HASHES_REMEMBERED:
                    self._known.clear()
                self._known[user_id] = known
        return known


def checked_type(session_type: str) -> str:
    """Return the type of a session, or say why it cannot be one."""
    if session_type not in SESSION_TYPES:
        raise ConfigurationError(
            f"session_type {session_type!r:.40} is unknown. Allowed are {', '.join(SESSION_TYPES)}."
        )
    return session_type


def text_or_none(value: object, name: str) -> str | None:
    """Return a short text that the app gave, or None; say why it cannot be one."""
    return None if value is None else check_text(value, name)


def checked_classifier(classify: Callable[[str], str]) -> Callable[[str], str]:
    """Return a classifier, or say why it cannot be one."""
    if not callable(classify):
        raise ConfigurationError(
            f"classify is a {type(classify).__name__}, which cannot be called. Pass a function from str to str: "
            "from what the user said to its type."
        )
    return classify


def with_stand_in(function: Callable[[], T], instead: Callable[[], T], doing: str) -> Callable[[], T]:
    """Return a function of the app's with another in its place for each call in which it raises.

    Args:
        function: The app's.
        instead: What is called instead.
        doing: What it does, for the log.
    """
    if function is instead:
        return function

    def ask() -> T:
        try:
            return function()
        except Exception as error:
            caught(doing, error)
            return instead()

    return ask


def checked_dropoff(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a rule for drop-offs, or say why it cannot be one."""
    if not callable(rule):
        raise ConfigurationError(
            f"dropoff is a {type(rule).__name__}, which cannot be called. Pass a function from DropoffFacts to a bool: "
            "dropoff=lambda facts: facts.session.end_reason == 'inactive_timeout'."
        )
    return rule


def checked_flag(value: Any, name: str) -> bool:
    """Return a yes or no, or say why it cannot be one: a text as "no" would count as yes.

    Raises:
        ConfigurationError: If it is neither True nor False.
    """
    if isinstance(value, bool):
        return value
    raise ConfigurationError(
        f"{name} is a {type(value).__name__}. Allowed are True and False: SessionTracker({name}=True)."
    )


def checked_function(value: Callable[..., T], name: str, what: str) -> Callable[..., T]:
    """Return a function, or say why it cannot be one.

    Raises:
        ConfigurationError: If it cannot be called.
    """
    if callable(value):
        return value
    raise ConfigurationError(f"{name} is a {type(value).__name__}, which cannot be called. Pass a function {what}.")


def checked_provider(provider: Any) -> trace.TracerProvider | None:
    """Return a provider of spans or None, or say why it cannot be one.

    Raises:
        ConfigurationError: If it is none of OpenTelemetry's.
    """
    if provider is None or isinstance(provider, trace.TracerProvider):
        return provider
    raise ConfigurationError(
        f"tracer_provider is a {type(provider).__name__}. Allowed is a TracerProvider of OpenTelemetry: "
        "tracer_provider=opentelemetry.trace.get_tracer_provider()."
    )


def checked_timeout(seconds: Any) -> float | None:
    """Return how long to wait, at most a year; None for as long as it takes.

    Raises:
        ConfigurationError: If it is no number of seconds.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds != seconds:  # not a number
        raise ConfigurationError(
            f"timeout is {seconds!r:.40}. Allowed is a number of seconds, or None to wait as long as it takes: "
            "flush(timeout=30)."
        )
    return min(max(0.0, seconds), _YEAR_S)


def checked_time(at_ns: Any) -> int:
    """Return a time in nanoseconds since 1970.

    Raises:
        ConfigurationError: If it is none that a database holds.
    """
    if isinstance(at_ns, bool) or not isinstance(at_ns, int) or not 0 <= at_ns < _LAST_NS:
        raise ConfigurationError(
            f"now is {at_ns!r:.40}. Allowed is a time in nanoseconds since 1970: now=time.time_ns()."
        )
    return at_ns


def idle_ns_of(idle_after: float | timedelta) -> int:
    """Return an idle time in nanoseconds, or say why it cannot be one."""
    seconds = idle_after.total_seconds() if isinstance(idle_after, timedelta) else idle_after
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_IDLE_S:
        raise ConfigurationError(
            f"idle_after is {idle_after!r:.40}. Allowed is a positive number of seconds or a timedelta, at most ten "
            "years: idle_after=1800."
        )
    return int(seconds * 1_000_000_000)


def outbox_bytes_of(megabytes: float) -> int:
    """Return how many bytes may wait in the outbox.

    Raises:
        ConfigurationError: If it is not a number above 0.
    """
    if isinstance(megabytes, bool) or not isinstance(megabytes, int | float) or not 0 < megabytes < float("inf"):
        raise ConfigurationError(
            f"outbox_max_mb is {megabytes!r:.40}. Allowed is a number of megabytes above 0: outbox_max_mb=512."
        )
    return int(megabytes * 1_000_000)


def hash_key_of(given: str | bytes | None, from_environment: Any, ledger: "Ledger") -> bytes:
    """Return the key for hashing users: the given one, that of the environment, or the one that the ledger keeps."""
    key = given
    if key is None and from_environment is not None:
        key = from_environment.get_secret_value()
    if key is None:
        return ledger.hash_key()
    encoded = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    if not isinstance(encoded, bytes):
        raise ConfigurationError(
            f"user_hash_key is a {type(key).__name__}. Allowed is a string or bytes of at least 16 bytes: pass the key "
            "from your secret store, or none."
        )
    if len(encoded) < 16:
        raise ConfigurationError(
            f"The key for hashing users has {len(encoded)} bytes; at least 16 are needed, so that hashes cannot be "
            "tried out. Make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return encoded
