"""Settings from the environment: ``TURNTRACE_*`` for turntrace, ``LANGFUSE_*`` as Langfuse's own SDK reads them."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, Final, TypeVar

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from turntrace.content import ContentLevel
from turntrace.errors import ConfigurationError

S = TypeVar("S", bound=BaseSettings)

MAX_IDLE_S: Final = 10 * 366 * 86_400.0
"""Longest idle time, in seconds: ten years."""

_PREFIX: Final = "TURNTRACE_"
_READ_ELSEWHERE: Final = ("TRACEBACK",)
_ALIKE: Final = 0.5
MAX_TIMEOUT_S: Final = 86_400.0
"""Longest that a request may take, in seconds: a day."""

RELEASES: Final = (
    *("RENDER_GIT_COMMIT", "CI_COMMIT_SHA", "CIRCLE_SHA1", "SOURCE_VERSION", "TRAVIS_COMMIT", "GIT_COMMIT"),
    *("GITHUB_SHA", "BITBUCKET_COMMIT", "BUILD_SOURCEVERSION", "DRONE_COMMIT_SHA"),
)
"""Where the release is read from when ``LANGFUSE_RELEASE`` is not set, in this order, as Langfuse's SDK does it."""

_QUEUE_LENGTH: Final = 2048
"""How many spans OpenTelemetry's queue holds where ``OTEL_BSP_MAX_QUEUE_SIZE`` does not say it."""

LANGFUSE_CLOUD: Final = "https://cloud.langfuse.com"
"""The server where ``LANGFUSE_BASE_URL`` says none, as Langfuse's SDK has it."""


class Settings(BaseSettings):
    """What is read from the environment; an argument of `turntrace.SessionTracker` goes before it.

    Attributes:
        ledger_url: SQLAlchemy URL of the ledger; by default a SQLite file in the user's data folder.
        user_hash_key: Secret key for hashing user ids; by default a random one, made once and kept in the ledger.
        content: What of the content is recorded: ``metadata``, ``turn`` or ``full``.
        idle_after: Seconds of silence after which the next turn begins a new session.
        channel: Channel of sessions that are given none.
        propagate: Whether turns travel to other servers, and from them.
        outbox_max_mb: How many megabytes (1,000,000 bytes) may wait to be sent; beyond it the oldest are dropped.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="ignore")

    ledger_url: str | None = None
    user_hash_key: SecretStr | None = None
    content: ContentLevel = "metadata"
    idle_after: float = Field(default=1800.0, gt=0, le=MAX_IDLE_S, allow_inf_nan=False)
    channel: str = Field(default="unknown", min_length=1, max_length=200)
    propagate: bool = False
    outbox_max_mb: float = Field(default=512.0, gt=0, allow_inf_nan=False)

    allowed: ClassVar[Mapping[str, str]] = {
        "content": "are metadata, turn and full: TURNTRACE_CONTENT=metadata",
        "idle_after": "is a number of seconds above 0, at most ten years: TURNTRACE_IDLE_AFTER=1800",
        "channel": "is a text of 1 to 200 characters: TURNTRACE_CHANNEL=web",
        "propagate": "are true and false: TURNTRACE_PROPAGATE=true",
        "outbox_max_mb": "is a number of megabytes above 0: TURNTRACE_OUTBOX_MAX_MB=512",
    }

    @property
    def ledger(self) -> str:
        """URL of the ledger."""
        return self.ledger_url or f"sqlite:///{default_ledger_path()}"


class LangfuseSettings(BaseSettings):
    """The settings of Langfuse's SDK that turntrace keeps the meaning of."""

    model_config = SettingsConfigDict(env_prefix="LANGFUSE_", extra="ignore")

    public_key: str | None = None
    secret_key: SecretStr | None = None
    base_url: str | None = None
    host: str | None = None
    tracing_environment: str | None = None
    release: str | None = None
    tracing_enabled: bool = True
    sample_rate: float = Field(default=1.0, ge=0.0, le=1.0)
    timeout: float = Field(default=5.0, gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)
    otel_traces_export_path: str = "api/public/otel/v1/traces"

    allowed: ClassVar[Mapping[str, str]] = {
        "tracing_enabled": "are true and false: LANGFUSE_TRACING_ENABLED=true",
        "sample_rate": "is a number from 0 to 1: LANGFUSE_SAMPLE_RATE=0.5",
        "timeout": "is a number of seconds above 0: LANGFUSE_TIMEOUT=5",
    }

    @field_validator("tracing_enabled", mode="before")
    @classmethod
    def _as_the_sdk_reads_it(cls, value: object) -> object:
        return value.lower() != "false" if isinstance(value, str) else value

    @property
    def has_keys(self) -> bool:
        """Whether there is a server to send to."""
        return bool(self.public_key and self.secret_key and self.secret_key.get_secret_value())

    @property
    def known_release(self) -> str | None:
        """The release, also as platforms that build and deploy name it."""
        return self.release or next((os.environ[name] for name in RELEASES if name in os.environ), None)

    @property
    def server(self) -> str:
        """URL of the server, without a slash at its end."""
        return (self.base_url or self.host or LANGFUSE_CLOUD).rstrip("/")


class LangfuseClientSettings(LangfuseSettings):
    """The same, with what only Langfuse's client reads, and cannot be made of when it is wrong."""

    flush_at: int | None = Field(default=None, gt=0)
    flush_interval: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    media_upload_thread_count: int | None = None

    allowed: ClassVar[Mapping[str, str]] = {
        **LangfuseSettings.allowed,
        "flush_at": "is a whole number of spans above 0, at most OTEL_BSP_MAX_QUEUE_SIZE (2048): LANGFUSE_FLUSH_AT=512",
        "flush_interval": "is a number of seconds above 0: LANGFUSE_FLUSH_INTERVAL=5",
        "media_upload_thread_count": "is a whole number: LANGFUSE_MEDIA_UPLOAD_THREAD_COUNT=1",
    }

    @field_validator("flush_at")
    @classmethod
    def _fits_the_queue(cls, value: int | None) -> int | None:
        length = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "")
        if value is not None and value > (int(length) if length.isdecimal() else _QUEUE_LENGTH):
            raise ValueError("it is more than fits into the queue")
        return value


def default_ledger_path() -> Path:
    """Return where the ledger is when nothing else is said."""
    return Path(platformdirs.user_data_dir("turntrace", appauthor=False)) / "ledger.db"


def read_settings() -> Settings:
    """Read ``TURNTRACE_*`` from the environment.

    Raises:
        ConfigurationError: If a variable cannot be used.
    """
    return _read(Settings)


def read_langfuse_settings() -> LangfuseSettings:
    """Read ``LANGFUSE_*`` from the environment.

    Raises:
        ConfigurationError: If a variable cannot be used.
    """
    return _read(LangfuseSettings)


def read_client_settings() -> LangfuseClientSettings:
    """Read ``LANGFUSE_*`` from the environment, for Langfuse's client.

    Raises:
        ConfigurationError: If a variable cannot be used.
    """
    return _read(LangfuseClientSettings)


def unknown_variables() -> list[tuple[str, str | None]]:
    """Return the variables ``TURNTRACE_*`` of the environment that nothing reads, each with the one it looks like."""
    known = [*(name.upper() for name in Settings.model_fields), *_READ_ELSEWHERE]
    ours = {name: name.upper().removeprefix(_PREFIX) for name in sorted(os.environ) if name.upper().startswith(_PREFIX)}
    return [
        (name, next((_PREFIX + alike for alike in get_close_matches(rest, known, n=1, cutoff=_ALIKE)), None))
        for name, rest in ours.items()
        if rest not in known
    ]


def _read(kind: type[S]) -> S:
    try:
        found = kind()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        name = f"{kind.model_config.get('env_prefix')}{field}".upper()
        allowed: Mapping[str, str] = getattr(kind, "allowed", {})
        if field not in allowed:  # a secret may be in it
            raise ConfigurationError(f"The environment variable {name} cannot be used: {first['msg']}.") from None
        raise ConfigurationError(
            f"The environment variable {name} is {first['input']!r:.40}. Allowed {allowed[field]}."
        ) from None
    for field, value in found:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if isinstance(text, str) and field not in _ANY_BYTES and not _is_utf8(text):
            name = f"{kind.model_config.get('env_prefix')}{field}".upper()
            raise ConfigurationError(f"The environment variable {name} cannot be used: it is not UTF-8. Set it anew.")
    return found


_ANY_BYTES: Final = ("ledger_url", "user_hash_key")
"""What may hold bytes that are not UTF-8: the name of a file, a key."""


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
