"""Settings: from the environment, and what is said when one cannot be used."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from turntrace import SessionTracker, TurntraceError
from turntrace.doctor import run_checks
from turntrace.errors import ConfigurationError, IdentityError
from turntrace.settings import (
    LangfuseSettings,
    Settings,
    default_ledger_path,
    read_langfuse_settings,
    read_settings,
    unknown_variables,
)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith(("TURNTRACE_", "LANGFUSE_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def tracker(ledger: str | None = "sqlite://", **arguments: Any) -> SessionTracker:
    from opentelemetry.sdk.trace import TracerProvider

    return SessionTracker(ledger, tracer_provider=TracerProvider(), outbox=True, **arguments)


# --- TURNTRACE_* ------------------------------------------------------------------------------------------------------
def test_nothing_has_to_be_set() -> None:
    settings = read_settings()
    assert settings.ledger == f"sqlite:///{default_ledger_path()}"
    assert settings.user_hash_key is None
    assert settings.content == "metadata"
    assert settings.idle_after == 1800
    assert settings.channel == "unknown"


def test_the_ledger_is_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_ledger_path().name == "ledger.db"
    assert default_ledger_path().parent.name == "turntrace"


def test_all_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNTRACE_LEDGER_URL", "sqlite:///here.db")
    monkeypatch.setenv("TURNTRACE_USER_HASH_KEY", "k" * 32)
    monkeypatch.setenv("TURNTRACE_CONTENT", "full")
    monkeypatch.setenv("TURNTRACE_IDLE_AFTER", "60.5")
    monkeypatch.setenv("TURNTRACE_CHANNEL", "web")
    settings = read_settings()
    assert settings.ledger == "sqlite:///here.db"
    assert settings.user_hash_key is not None
    assert settings.user_hash_key.get_secret_value() == "k" * 32
    assert (settings.content, settings.idle_after, settings.channel) == ("full", 60.5, "web")
    assert "k" * 32 not in repr(settings)


def test_the_tracker_takes_what_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TURNTRACE_LEDGER_URL", f"sqlite:///{tmp_path}/set.db")
    monkeypatch.setenv("TURNTRACE_USER_HASH_KEY", "k" * 32)
    monkeypatch.setenv("TURNTRACE_CONTENT", "turn")
    monkeypatch.setenv("TURNTRACE_IDLE_AFTER", "60.5")
    monkeypatch.setenv("TURNTRACE_CHANNEL", "web")
    with tracker(None) as made:
        assert (tmp_path / "set.db").exists()
        assert made.content.level == "turn"
        assert made.idle_ns == 60_500_000_000
        assert made.channel == "web"
        assert made.hash_user("alice") == tracker(user_hash_key="k" * 32).hash_user("alice")


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TURNTRACE_LEDGER_URL", f"sqlite:///{tmp_path}/set.db")
    monkeypatch.setenv("TURNTRACE_USER_HASH_KEY", "k" * 32)
    monkeypatch.setenv("TURNTRACE_CONTENT", "full")
    monkeypatch.setenv("TURNTRACE_IDLE_AFTER", "60")
    monkeypatch.setenv("TURNTRACE_CHANNEL", "web")
    given = {"content": "turn", "idle_after": 5, "channel": "slack", "user_hash_key": b"x" * 32}
    with tracker(f"sqlite:///{tmp_path}/given.db", **given) as made:
        assert not (tmp_path / "set.db").exists()
        assert (made.content.level, made.idle_ns, made.channel) == ("turn", 5_000_000_000, "slack")
        assert made.hash_user("alice") == tracker(user_hash_key="x" * 32).hash_user("alice")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("TURNTRACE_CONTENT", "all", "are metadata, turn and full: TURNTRACE_CONTENT=metadata."),
        ("TURNTRACE_CONTENT", "", "are metadata, turn and full"),
        (
            "TURNTRACE_IDLE_AFTER",
            "abc",
            "is a number of seconds above 0, at most ten years: TURNTRACE_IDLE_AFTER=1",
        ),
        ("TURNTRACE_IDLE_AFTER", "0", "is a number of seconds above 0"),
        ("TURNTRACE_IDLE_AFTER", "-1", "is a number of seconds above 0"),
        ("TURNTRACE_IDLE_AFTER", "nan", "is a number of seconds above 0"),
        ("TURNTRACE_IDLE_AFTER", "inf", "is a number of seconds above 0"),
        ("TURNTRACE_CHANNEL", "", "is a text of 1 to 200 characters: TURNTRACE_CHANNEL=web."),
        ("TURNTRACE_PROPAGATE", "perhaps", "are true and false: TURNTRACE_PROPAGATE=true."),
        ("TURNTRACE_OUTBOX_MAX_MB", "0", "is a number of megabytes above 0: TURNTRACE_OUTBOX_MAX_MB=512."),
    ],
)
def test_a_variable_that_cannot_be_used_is_said_with_its_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as error:
        tracker()
    assert str(error.value).startswith(f"The environment variable {name} is {value!r}. Allowed {allowed}")


def test_a_long_value_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNTRACE_CHANNEL", "x" * 201)
    with pytest.raises(ConfigurationError, match=r"TURNTRACE_CHANNEL is 'x{39}\. Allowed is a text"):
        tracker()


def test_every_variable_that_can_be_wrong_has_words_for_it_and_no_secret_has() -> None:
    for kind in (Settings, LangfuseSettings):
        texts = {name for name, each in kind.model_fields.items() if "str" in str(each.annotation).lower()}
        assert set(kind.allowed) == (set(kind.model_fields) - texts) | (set(kind.model_fields) & {"channel"})


def test_variables_that_nothing_reads_are_named_with_what_they_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_variables() == []
    for name in ("TURNTRACE_IDLE", "TURNTRACE_IDLE_AFTER", "TURNTRACE_ZZZ", "TURNTRACE_LEDGER", "TURNTRACE_TRACEBACK"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == [
        ("TURNTRACE_IDLE", "TURNTRACE_IDLE_AFTER"),
        ("TURNTRACE_LEDGER", "TURNTRACE_LEDGER_URL"),
        ("TURNTRACE_ZZZ", None),
    ]
    found = {check.name: check for check in run_checks("sqlite://")}["variables"]
    assert (found.ok, found.found) == (None, "nothing reads TURNTRACE_IDLE, TURNTRACE_LEDGER, TURNTRACE_ZZZ")
    assert found.todo.startswith("Unset them, or set TURNTRACE_IDLE as TURNTRACE_IDLE_AFTER, ")


def test_a_short_hash_key_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "short", "x" * 15):
        monkeypatch.setenv("TURNTRACE_USER_HASH_KEY", value)
        with pytest.raises(ConfigurationError, match="at least 16") as error:
            tracker()
        assert not value or value not in str(error.value)


# --- LANGFUSE_* -------------------------------------------------------------------------------------------------------
def test_without_keys_there_is_no_server_to_send_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not read_langfuse_settings().has_keys
    monkeypatch.setenv("LANGFUSE_PUBLIC_KEY", "pk")
    assert not read_langfuse_settings().has_keys
    monkeypatch.setenv("LANGFUSE_SECRET_KEY", "")
    assert not read_langfuse_settings().has_keys
    monkeypatch.setenv("LANGFUSE_SECRET_KEY", "sk-secret")
    settings = read_langfuse_settings()
    assert settings.has_keys
    assert settings.tracing_enabled
    assert settings.sample_rate == 1
    assert "sk-secret" not in repr(settings)


def test_langfuses_settings_are_read_as_its_sdk_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGFUSE_TRACING_ENVIRONMENT", "staging")
    monkeypatch.setenv("LANGFUSE_RELEASE", "v1")
    monkeypatch.setenv("LANGFUSE_TRACING_ENABLED", "False")
    monkeypatch.setenv("LANGFUSE_SAMPLE_RATE", "0.25")
    settings = read_langfuse_settings()
    assert settings.tracing_environment == "staging"
    assert settings.release == "v1"
    assert settings.tracing_enabled is False
    assert settings.sample_rate == 0.25


@pytest.mark.parametrize(("name", "value"), [("LANGFUSE_SAMPLE_RATE", "2"), ("LANGFUSE_SAMPLE_RATE", "x")])
def test_a_langfuse_variable_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=rf"{name} is '{value}'. Allowed .*{name}="):
        read_langfuse_settings()


# --- arguments of the tracker -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("idle_after", [0, -1, float("nan"), "1800", True, timedelta(0)])
def test_an_idle_time_that_is_none_is_refused(idle_after: Any) -> None:
    with pytest.raises(ConfigurationError, match="idle_after=1800"):
        tracker(idle_after=idle_after)


@pytest.mark.parametrize("idle_after", [float("inf"), 1e12, timedelta.max], ids=repr)
def test_an_idle_time_without_end_is_refused_or_works(idle_after: Any) -> None:
    try:
        made = tracker(idle_after=idle_after)
    except ConfigurationError:
        return
    from turntrace.records import TurnRequest

    with made:
        first = made.begin_turn(TurnRequest(user_id="alice"), "Hello")
        second = made.begin_turn(TurnRequest(user_id="alice"), "Hello")
        assert first.conversation.session.id == second.conversation.session.id
        first.end()
        second.end()


def test_an_idle_time_may_be_a_timedelta_or_a_fraction() -> None:
    assert tracker(idle_after=timedelta(minutes=5)).idle_ns == 300_000_000_000
    assert tracker(idle_after=0.5).idle_ns == 500_000_000


@pytest.mark.parametrize("content", ["all", 3])
def test_an_unknown_content_level_is_refused(content: Any) -> None:
    with pytest.raises(ConfigurationError, match="Allowed are metadata, turn, full"):
        tracker(content=content)


@pytest.mark.parametrize("key", ["", b"", "short", b"x" * 15, "ä" * 7])
def test_a_short_hash_key_is_refused_with_how_to_make_one(key: str | bytes) -> None:
    with pytest.raises(ConfigurationError, match="at least 16") as error:
        tracker(user_hash_key=key)
    assert "secrets.token_hex(32)" in str(error.value)
    assert not key or str(key) not in str(error.value)


@pytest.mark.parametrize("key", ["x" * 16, b"x" * 16, "ä" * 8])
def test_a_hash_key_of_sixteen_bytes_is_taken(key: str | bytes) -> None:
    assert len(tracker(user_hash_key=key).hash_user("alice")) == 64


@pytest.mark.parametrize("channel", ["", "x" * 201, 1.5])
def test_a_channel_that_cannot_be_used_is_refused(channel: Any) -> None:
    with pytest.raises(IdentityError, match="channel"):
        tracker(channel=channel)


@pytest.mark.parametrize("arguments", [{"user_hash_key": 12345678901234567890}, {"classify": "question"}], ids=str)
def test_an_argument_of_the_wrong_type_is_refused_at_once(arguments: dict[str, Any]) -> None:
    # Not later, by the thread that writes: there nobody would hear of it.
    with pytest.raises(TurntraceError):
        tracker(**arguments)


@pytest.mark.parametrize(
    ("ledger", "offered"),
    [
        ("ledger.db", "sqlite:///ledger.db"),
        ("foo", "sqlite:///foo"),
        ("/var/lib/app/turntrace.db", "sqlite:////var/lib/app/turntrace.db"),
        (Path("here") / "ledger.db", "sqlite:///here/ledger.db"),
    ],
    ids=str,
)
def test_a_file_for_a_ledger_is_answered_with_its_url(ledger: Any, offered: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        tracker(ledger)
    assert str(error.value).startswith(f"The ledger is {str(ledger)!r}, which is no database URL. Pass {offered!r} ")


@pytest.mark.parametrize("ledger", ["postgresql//me:hunter2@host/db", "me:hunter2@host", "pw=hunter2", "hunter2@h"])
def test_what_may_hold_a_password_is_not_shown(ledger: str) -> None:
    with pytest.raises(ConfigurationError, match="not a database URL") as error:
        tracker(ledger)
    assert "hunter2" not in str(error.value)


def test_what_is_no_text_at_all_is_no_ledger() -> None:
    wrong: Any = 5
    with pytest.raises(ConfigurationError, match="sqlite:///"):
        tracker(wrong)


@pytest.mark.parametrize(("said", "means"), [("", True), ("0", True), ("no", True), ("FALSE", False), ("False", False)])
def test_tracing_is_off_where_langfuses_sdk_has_it_off(said: str, means: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGFUSE_TRACING_ENABLED", said)
    assert read_langfuse_settings().tracing_enabled is means
