"""What programs read: JSON and CSV, with stable names. Times are ISO 8601 in UTC, under names that end in ``_at``."""

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Final

from turntrace.analytics import Dropoffs, Funnel, UserFigures
from turntrace.cli.render import safe
from turntrace.decisions import PruningDecision
from turntrace.errors import ConfigurationError
from turntrace.records import Step, TurnSummary, iso_time
from turntrace.summaries import Feedback, SessionSummary, StageEntered

Plain = dict[str, Any]

_OF_USERS: Final = ("user_avg_session_length", "user_retention_days")
"""What only one session is asked for: a list of many leaves it out, so that no null says that it is not known."""
_FORMULAS: Final = ("=", "+", "-", "@", "\t")


# --- how it is written ------------------------------------------------------------------------------------------------
def check_one_form(as_json: bool, as_csv: bool) -> None:
    """Refuse to write both.

    Raises:
        ConfigurationError: If both are wanted.
    """
    if as_json and as_csv:
        raise ConfigurationError("--json and --csv cannot both be written: give one of them.")


def write_json(value: Any) -> None:
    """Write a value as JSON, in ASCII."""
    print(json.dumps(value, indent=2))


def write_rows(rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, as_csv: bool) -> None:
    """Write rows as CSV with these columns, or as one JSON array."""
    if as_csv:
        write_csv(names, rows)
    else:
        write_json(rows)


def write_csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV (RFC 4180), after a row of their names.

    What is not printable is written as an escape, and a text that a spreadsheet would run as a formula gets an
    apostrophe before it, which it hides. JSON has all texts as they are.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(newline="")  # its lines end with CR and LF everywhere
    writer = csv.writer(sys.stdout)
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row[name]) for name in names])


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return value  # a number, or None, which is an empty cell
    return f"'{safe(value)}" if value.startswith(_FORMULAS) else safe(value)


# --- what is written --------------------------------------------------------------------------------------------------
def plain(record: Any, *properties: str, without: Sequence[str] = ()) -> Plain:
    """Return the fields of a dataclass under their names, times in nanoseconds as ISO 8601 under ``..._at``.

    Args:
        record: The dataclass; dataclasses in it are written likewise.
        properties: Properties that are added.
        without: Fields that are left out.
    """
    names = [each.name for each in fields(record) if each.name not in without]
    found: Plain = {}
    for name in (*names, *properties):
        value = getattr(record, name)
        if name.endswith("_ns"):
            name, value = _time_name(name), None if value is None else iso_time(value)
        found[name] = _plain_value(value)
    return found


def _time_name(name: str) -> str:
    """Return what a time in nanoseconds is called: ``started_ns`` is ``started_at``, and ``at_ns`` is ``at``."""
    return "at" if name == "at_ns" else f"{name[:-3]}_at"


def _plain_value(value: Any) -> Any:
    if is_dataclass(value):
        return plain(value)
    return [_plain_value(each) for each in value] if isinstance(value, list | tuple) else value


def session_row(session: SessionSummary, *, alone: bool = False) -> Plain:
    """Return a session; alone also with what its user's figures were."""
    added = ("duration_ms", "total_tokens", "avg_turn_latency_ms", "avg_turn_tokens")
    return plain(session, *added, without=() if alone else _OF_USERS)


SESSION_NAMES: Final = tuple(session_row(SessionSummary(id="")))
USER_NAMES: Final = tuple(plain(UserFigures("", 0, 0, 0, 0.0, 0, 0, 0, None)))


STAGE_NAMES: Final = (
    *("name", "number", "stage", "entered", "reached", "left", "stayed_p50_ms"),
    *("begun", "converted", "rate", "conversion_p50_ms", "conversion_turns_p50"),
)
DROPOFF_NAMES: Final = ("by", "at", "ended", "dropoffs", "rate")


def stage_rows(funnels: Iterable[Funnel]) -> list[Plain]:
    """Return a row for each stage of journeys; what is said of a whole journey is in each."""
    rows = []
    for funnel in funnels:
        whole = plain(funnel, "rate", without=("stages",))
        rows += [whole | plain(stage) for stage in funnel.stages]
    return rows


def dropoff_rows(by: Mapping[str, Iterable[Dropoffs]]) -> list[Plain]:
    """Return a row for each point at which sessions ended, with what it is one of."""
    return [{"by": name} | plain(each, "rate") for name, rows in by.items() for each in rows]


def session_document(
    session: SessionSummary,
    turns: Sequence[tuple[TurnSummary, Sequence[Step]]],
    journey: Sequence[StageEntered],
    feedback: Sequence[Feedback],
    decisions: Sequence[tuple[str, PruningDecision]],
) -> Plain:
    """Return a session with its turns, their steps, what was pruned, the steps of its journeys and its feedback."""
    return {
        **session_row(session, alone=True),
        "turns": [
            {
                **plain(turn, "context_window_pct", without=("own",)),
                "steps": [plain(step) for step in steps],
                "pruned": [plain(each) for turn_id, each in decisions if turn_id == turn.id and each.pruned],
            }
            for turn, steps in turns
        ],
        "journey_steps": [plain(step) for step in journey],
        "feedback": [plain(given) for given in feedback],
    }
