"""The options that say which sessions a command is about; every command that asks about many of them has them."""

import inspect
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Final

import typer

from turntrace.analytics import ALL, Filters, day_of
from turntrace.analytics.filters import OPEN
from turntrace.analytics.times import check_order
from turntrace.analytics.totals import values_of
from turntrace.cli.lookup import find_user, hash_of, open_existing
from turntrace.cli.running import LedgerOption
from turntrace.errors import ConfigurationError
from turntrace.identity import safe_id
from turntrace.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a command is about.

    Attributes:
        ledger: The ledger.
        filters: Which of its sessions.
        user_id: The id that the user was named by, as it was typed.
    """

    ledger: Ledger
    filters: Filters
    user_id: str | None = None

    @property
    def is_all(self) -> bool:
        """Whether it is about all sessions."""
        return self.filters == ALL

    @property
    def said(self) -> str:
        """What was asked for, as it was typed."""
        if self.user_id is None:
            return str(self.filters)
        others = self.filters.of(user_id=None)
        return ", ".join(([] if others == ALL else [str(others)]) + [f"user_id {self.user_id}"])

    def wrong(self) -> list[str]:
        """Return what to know where nothing was found: of filters that nothing meets, what there is instead."""
        found = []
        for name, option in _VALUES.items():
            value = getattr(self.filters, name)
            if not value or (name == "end_reason" and value == OPEN):
                continue
            there = values_of(self.ledger, name, limit=_LOOKED_AT)
            if name == "end_reason" and there:
                there = [*there, OPEN]
            if value not in there and len(there) < _LOOKED_AT:
                more = f" and {len(there) - _NAMED:,} more" if len(there) > _NAMED else ""
                named = f"there are {', '.join(there[:_NAMED])}{more}" if there else "there are none on record"
                found.append(f"No session has {option} {value}: {named}.")
        return found


def _option(name: str, metavar: str, text: str) -> Any:
    return Annotated[str | None, typer.Option(name, metavar=metavar, help=text)]


_DAY: Final = (
    "a day or time in ISO 8601 (UTC where it says nothing else), 14:05 of today, 7d or 1h30m ago, today, yesterday"
)
_OPTIONS: Final[dict[str, Any]] = {
    "since": _option("--since", "DAY", f"Only sessions that began then or later: {_DAY}."),
    "until": _option("--until", "DAY", "Only sessions that began before it."),
    "channel": _option("--channel", "NAME", "Only sessions of this channel."),
    "tier": _option("--tier", "NAME", "Only sessions of users of this tier."),
    "org": _option("--org", "ID", "Only sessions of users of this organisation."),
    "topic": _option("--topic", "NAME", "Only sessions with a conversation about this topic."),
    "model": _option("--model", "NAME", "Only sessions with a turn whose last call was of this model."),
    "end_reason": _option("--end-reason", "REASON", "Only sessions that ended for this reason; open: have not ended."),
    "user": _option("--user", "HASH", "Only sessions of this user: the hash, or as much of it as is unique."),
    "user_id": _option("--user-id", "ID", "The same by the user's id as your app has it, which is hashed."),
    "conversation": _option("--conversation", "ID", "Only sessions with a turn of this conversation (thread)."),
    "error": _option("--error", "CLASS", "Only sessions with a turn that ended with an error of this class."),
    "failed": Annotated[bool, typer.Option("--failed", help="Only sessions with a turn that failed or was abandoned.")],
    "unsatisfied": Annotated[
        bool, typer.Option("--unsatisfied", help="Only sessions with feedback whose mean is below 0.5.")
    ],
    "ledger": LedgerOption,
}
_VALUES: Final = {
    "channel": "--channel",
    "tier": "--tier",
    "org_id": "--org",
    "topic": "--topic",
    "model": "--model",
    "end_reason": "--end-reason",
    "error": "--error",
}
_FLAGS: Final = ("failed", "unsatisfied")
_NAMED: Final = 8
_LOOKED_AT: Final = 1000


def about_sessions(function: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of `Chosen`, which it is called with as its first argument.

    Args:
        function: The command.
    """

    @wraps(function)
    def run(**arguments: Any) -> int:
        given = {name: arguments.pop(name) for name in _OPTIONS}
        with closing(open_existing(given.pop("ledger"))) as ledger:
            user_id = given["user_id"]
            return function(Chosen(ledger, _filters(ledger, given), user_id), **arguments)

    own = list(inspect.signature(function).parameters.values())[1:]
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False if name in _FLAGS else None, annotation=annotation
        )
        for name, annotation in _OPTIONS.items()
    ]
    keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    hints = {each.name: each.annotation for each in (*own, *added)} | {"return": int}
    run.__signature__ = inspect.Signature([*keyword_only, *added], return_annotation=int)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run


def _filters(ledger: Ledger, given: dict[str, Any]) -> Filters:
    since, until = given.pop("since"), given.pop("until")
    user, user_id = given.pop("user"), given.pop("user_id")
    if user is not None and user_id is not None:
        raise ConfigurationError("--user and --user-id name the same user in two ways: give one of them.")
    if user is not None:
        user = find_user(ledger, user)
    elif user_id is not None:
        user = hash_of(ledger, user_id)
    since_ns = None if since is None else day_of(since, "--since")
    until_ns = None if until is None else day_of(until, "--until")
    check_order(since_ns, until_ns, "--since", "--until")
    return Filters(
        since_ns=since_ns,
        until_ns=until_ns,
        org_id=given.pop("org"),
        user_id=user,
        conversation_id=None if (conversation := given.pop("conversation", None)) is None else safe_id(conversation),
        **given,
    )
