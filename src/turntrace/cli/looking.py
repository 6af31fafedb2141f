"""The commands that show what is on record: sessions, one session, users."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Self, cast

import typer
from rich.console import Console

from turntrace.analytics import abandoned_turns, sessions_by, slowest_turns, totals
from turntrace.analytics import users as users_by
from turntrace.cli import links, lists, machine, tree, window
from turntrace.cli.choosing import Chosen, about_sessions
from turntrace.cli.lookup import Named, find_named, numbered, open_existing, session_of, suggest_sessions
from turntrace.cli.render import stdout, working
from turntrace.cli.running import OK, CsvOption, JsonOption, LedgerOption
from turntrace.decisions import PruningDecision
from turntrace.errors import ConfigurationError
from turntrace.ledger import Ledger
from turntrace.records import Step, TurnSummary
from turntrace.summaries import Feedback, SessionSummary, StageEntered


class SessionOrder(StrEnum):
    """The orders of sessions."""

    NEWEST = "newest"
    LONGEST = "longest"
    MOST_TURNS = "most-turns"
    DEAREST = "dearest"
    SLOWEST = "slowest"
    SLOWEST_TURN = "slowest-turn"
    MOST_TOKENS = "most-tokens"
    MOST_FAILED = "most-failed"
    LEAST_SATISFIED = "least-satisfied"


class UserOrder(StrEnum):
    """The orders of users."""

    LATEST = "latest"
    MOST_SESSIONS = "most-sessions"
    MOST_TURNS = "most-turns"
    DEAREST = "dearest"
    MOST_DROPOFFS = "most-dropoffs"
    LEAST_SATISFIED = "least-satisfied"


_SORTED_BY: Final = {
    "longest": "duration",
    "most-turns": "turns",
    "dearest": "cost",
    "slowest": "per turn",
    "most-tokens": "tokens",
    "most-failed": "failed",
    "most-dropoffs": "drop-offs",
    "least-satisfied": "satisfied",
}
"""The columns that orders are by, which are shown in any width."""
_SHOWN: Final = 20
_SESSIONS_SHOWN: Final = 5
"""Of a conversation that goes on in many."""
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        min=1,
        max=1_000_000_000,
        help=f"How many to show at most. Default: {_SHOWN}; in JSON and CSV all.",
    ),
]


@about_sessions
def sessions(
    chosen: Chosen,
    sort: Annotated[
        SessionOrder,
        typer.Option(
            "--sort",
            help="Which come first; slowest: by the mean latency of their turns; slowest-turn: by that of one turn.",
        ),
    ] = SessionOrder.NEWEST,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> int:
    """Show sessions, the latest first or by another order."""
    machine.check_one_form(as_json, as_csv)
    with working("Asking the ledger"):
        limit = _limit(limit, all_of_them=as_json or as_csv)
        found = sessions_by(chosen.ledger, cast(Any, _words(sort)), chosen.filters, limit=limit)
        about, ids = _about(chosen, sort), [] if as_json or as_csv else [session.id for session in found]
        slowest = slowest_turns(chosen.ledger, ids) if sort is SessionOrder.SLOWEST_TURN else None
        abandoned = abandoned_turns(chosen.ledger, ids) if "failed" in about else {}
    if as_json or as_csv:
        machine.write_rows([machine.session_row(session) for session in found], machine.SESSION_NAMES, as_csv=as_csv)
        lists.warn_of_nothing(chosen, found)
    elif found:
        lists.sessions_table(stdout(), found, about=about, slowest=slowest, abandoned=abandoned)
        if len(found) == limit:
            lists.cut(stdout(), limit, totals(chosen.ledger, chosen.filters).sessions, "sessions")
    else:
        lists.nothing(stdout(), chosen)
    return OK


@about_sessions
def users(
    chosen: Chosen,
    sort: Annotated[UserOrder, typer.Option("--sort", help="Which come first.")] = UserOrder.LATEST,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> int:
    """Show users and what they used, by the hashes of their ids."""
    machine.check_one_form(as_json, as_csv)
    with working("Asking the ledger"):
        limit = _limit(limit, all_of_them=as_json or as_csv)
        found = users_by(chosen.ledger, cast(Any, _words(sort)), chosen.filters, limit=limit)
    if as_json or as_csv:
        machine.write_rows([machine.plain(user) for user in found], machine.USER_NAMES, as_csv=as_csv)
        lists.warn_of_nothing(chosen, found)
    elif found:
        lists.users_table(stdout(), found, about=_about(chosen, sort))
        if len(found) == limit:
            lists.cut(stdout(), limit, totals(chosen.ledger, chosen.filters).users, "users")
    else:
        lists.nothing(stdout(), chosen, "users")
    return OK


def _limit(given: int | None, *, all_of_them: bool) -> int | None:
    return _SHOWN if given is None and not all_of_them else given


def _about(chosen: Chosen, sort: StrEnum) -> set[str]:
    """Return the names of the columns that were asked for, by an order or by filters."""
    about = {column for order, column in _SORTED_BY.items() if order == sort.value}
    if chosen.filters.failed is not None or chosen.filters.error is not None:
        about.add("failed")
    if chosen.filters.unsatisfied is not None:
        about.add("satisfied")
    return about


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
            metavar="ID",
            help="Id of a session, a turn or a trace, or as much of it as is unique; or of a conversation (thread).",
            autocompletion=_suggest,
        ),
    ],
    context: Annotated[
        bool, typer.Option("--context", help="Draw how full the model's window was, turn by turn, prunings marked.")
    ] = False,
    turn: Annotated[
        int | None,
        typer.Option(
            "--turn", metavar="N", min=1, max=2**31 - 1, help="Only the turn of this number, as it stands in the tree."
        ),
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="One line a turn, without what happened in it.")] = False,
    as_json: JsonOption = False,
    ledger: LedgerOption = None,
) -> int:
    """Show what happened in a session, as a tree.

    Its turns with what they took, and what the agent did in each: runs of the graph, nodes, calls of models and tools.
    Then its journeys, its feedback, and how it ended. Times are in UTC. A turn is slow that took more than a second and
    more than three times the median of its session's turns.

    By the id of a turn or a trace it shows that turn, with those before and after it in a line each; by the id of a
    conversation the sessions that it is in, and marks it. The JSON has all turns but with --turn; of a conversation it
    is an array.
    """
    if brief and (context or as_json):
        raise ConfigurationError(
            f"--brief and {'--context' if context else '--json'} show a session in two ways: give one."
        )
    with closing(open_existing(ledger)) as opened:
        named = find_named(opened, session_id)
        if turn is not None:
            named = numbered(opened, named, turn)
        shown = named.session_ids if as_json else named.session_ids[-_SESSIONS_SHOWN:]
        found = [_Whole.read(opened, each) for each in shown]
    if as_json:
        documents = [each.document(named.only) for each in found]
        machine.write_json(documents[0] if named.conversation_id is None else documents)
        return OK
    console = stdout()
    if len(named.session_ids) > len(shown):
        lists.cut_conversation(console, len(shown), len(named.session_ids), session_id)
    for number, each in enumerate(found):
        if number:
            console.print()
        each.draw(console, named, context=context, brief=brief)
    if not context:
        links.say_where(console, [each.session.id for each in found])
    return OK


@dataclass(frozen=True, slots=True)
class _Whole:
    """All that is known of a session."""

    session: SessionSummary
    turns: Sequence[tuple[TurnSummary, Sequence[Step]]]
    stages: Sequence[StageEntered]
    feedback: Sequence[Feedback]
    decisions: Sequence[tuple[str, PruningDecision]]

    @classmethod
    def read(cls, ledger: Ledger, session_id: str) -> Self:
        about: Any = (ledger.turns, ledger.stages, ledger.feedback, ledger.decisions)
        return cls(session_of(ledger, session_id), *(ask(session_id) for ask in about))

    def _turns(self, only: Sequence[str]) -> Sequence[tuple[TurnSummary, Sequence[Step]]]:
        return [each for each in self.turns if not only or each[0].id in only]

    def document(self, only: Sequence[str]) -> machine.Plain:
        return machine.session_document(self.session, self._turns(only), self.stages, self.feedback, self.decisions)

    def draw(self, console: Console, named: Named, *, context: bool, brief: bool) -> None:
        if context:
            shown = [turn for turn, _ in self._turns(named.only)]
            window.context_chart(console, self.session, shown, self.decisions)
        else:
            tree.session_tree(console, self.session, self.turns, self.stages, self.feedback, named=named, brief=brief)
