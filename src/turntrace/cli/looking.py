"""The commands that show what is on record: sessions, one session, users."""

from contextlib import closing
from enum import StrEnum
from typing import Annotated, Any, cast

import typer

from turntrace.analytics import sessions_by
from turntrace.analytics import users as users_by
from turntrace.cli import lists, machine, tree, window
from turntrace.cli.choosing import Chosen, about_sessions
from turntrace.cli.lookup import find_session, open_existing, suggest_sessions
from turntrace.cli.render import stdout, working
from turntrace.cli.running import OK, CsvOption, JsonOption, LedgerOption
from turntrace.errors import ConfigurationError


class SessionOrder(StrEnum):
    """The orders of sessions."""

    NEWEST = "newest"
    LONGEST = "longest"
    MOST_TURNS = "most-turns"
    DEAREST = "dearest"
    SLOWEST = "slowest"
    MOST_TOKENS = "most-tokens"


class UserOrder(StrEnum):
    """The orders of users."""

    LATEST = "latest"
    MOST_SESSIONS = "most-sessions"
    MOST_TURNS = "most-turns"
    DEAREST = "dearest"
    MOST_DROPOFFS = "most-dropoffs"


LimitOption = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, max=1_000_000_000, help="How many to show at most.")
]


@about_sessions
def sessions(
    chosen: Chosen,
    sort: Annotated[
        SessionOrder, typer.Option("--sort", help="Which come first; the slowest by the mean latency of their turns.")
    ] = SessionOrder.NEWEST,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> int:
    """Show sessions, the latest first or by another order."""
    _check_one_form(as_json, as_csv)
    with working("Asking the ledger"):
        found = sessions_by(chosen.ledger, cast(Any, _words(sort)), chosen.filters, limit=limit)
    if as_json or as_csv:
        machine.write_rows([machine.session_row(session) for session in found], machine.SESSION_NAMES, as_csv=as_csv)
    elif found:
        lists.sessions_table(stdout(), found)
    else:
        lists.nothing(stdout(), chosen.filters, is_all=chosen.is_all)
    return OK


@about_sessions
def users(
    chosen: Chosen,
    sort: Annotated[UserOrder, typer.Option("--sort", help="Which come first.")] = UserOrder.LATEST,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> int:
    """Show users and what they used, by the hashes of their ids."""
    _check_one_form(as_json, as_csv)
    with working("Asking the ledger"):
        found = users_by(chosen.ledger, cast(Any, _words(sort)), chosen.filters, limit=limit)
    if as_json or as_csv:
        machine.write_rows([machine.plain(user) for user in found], machine.USER_NAMES, as_csv=as_csv)
    elif found:
        lists.users_table(stdout(), found)
    else:
        lists.nothing(stdout(), chosen.filters, is_all=chosen.is_all, what="users")
    return OK


def _check_one_form(as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise ConfigurationError("--json and --csv cannot both be written: give one of them.")


def _words(order: StrEnum) -> str:
    """Return the name of an order as analytics has it."""
    return order.value.replace("-", " ")


def _suggest(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the ids with which a shell completes what was typed."""
    return list(suggest_sessions(ctx.params.get("ledger"), incomplete))


def show(
    session_id: Annotated[
        str,
        typer.Argument(
            metavar="SESSION", help="Id of a session, or as much of it as is unique.", autocompletion=_suggest
        ),
    ],
    context: Annotated[
        bool, typer.Option("--context", help="Draw how full the model's window was, turn by turn, prunings marked.")
    ] = False,
    as_json: JsonOption = False,
    ledger: LedgerOption = None,
) -> int:
    """Show what happened in a session, as a tree.

    Its turns with what they took, and what the agent did in each: runs of the graph, nodes, calls of models and tools.
    Then its journeys, its feedback, and how it ended. Times are in UTC.
    """
    with closing(open_existing(ledger)) as opened:
        session = find_session(opened, session_id)
        turns, stages = opened.turns(session.id), opened.stages(session.id)
        feedback, decisions = opened.feedback(session.id), opened.decisions(session.id)
    if as_json:
        machine.write_json(machine.session_document(session, turns, stages, feedback, decisions))
    elif context:
        window.context_chart(stdout(), session, [turn for turn, _ in turns], decisions)
    else:
        tree.session_tree(stdout(), session, turns, stages, feedback)
    return OK
