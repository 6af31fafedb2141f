"""Erasing a user from the ledger."""

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import Connection, Table, delete, exists, func, literal, or_, select, tuple_, update

from turntrace import attributes as a
from turntrace.forking import importing
from turntrace.ledger.tables import (
    conversations,
    decisions,
    feedback,
    gates,
    journeys,
    open_turns,
    outbox,
    refused,
    sessions,
    stages,
    turn_steps,
    turns,
)
from turntrace.waiting import SCORE

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

_BATCH: Final = 200
_BY_SESSION: Final = (decisions, feedback, stages, turns, open_turns)


class Erased(NamedTuple):
    """What was erased of a user.

    Attributes:
        sessions: Ids of the sessions.
        turns: How many turns.
        traces: Ids of the turns' traces.
    """

    sessions: tuple[str, ...]
    turns: int
    traces: frozenset[str]


def forget(connection: Connection, user_id: str) -> Erased:
    """Erase all rows of a user.

    Args:
        connection: A connection in a transaction.
        user_id: Hash of the user's id.
    """
    mine = select(sessions.c.id).where(sessions.c.user_id == user_id)
    session_ids = list(connection.execute(mine.order_by(sessions.c.started_ns)).scalars())
    traces = [
        trace_id
        for table in (turns, open_turns)
        for trace_id in connection.execute(select(table.c.trace_id).where(table.c.session_id.in_(mine))).scalars()
    ]
    owners = select(literal("session:") + sessions.c.id).where(sessions.c.user_id == user_id)
    connection.execute(delete(journeys).where(or_(journeys.c.owner == user_id, journeys.c.owner.in_(owners))))
    _erase_by_session(connection, mine)
    _leave_to_others(connection, user_id)
    in_mine = conversations.c.session_id.in_(mine)
    numbers = select(literal("number:") + conversations.c.id).where(in_mine)
    connection.execute(delete(gates).where(or_(gates.c.key == f"session:{user_id}", gates.c.key.in_(numbers))))
    connection.execute(delete(conversations).where(in_mine))
    connection.execute(delete(sessions).where(sessions.c.user_id == user_id))
    return Erased(tuple(session_ids), len(traces), frozenset(traces))


def forget_ended(connection: Connection, before_ns: int, most: int) -> list[str]:
    """Erase sessions that ended before a time, the oldest first, with their turns, decisions, stages and feedback.

    A conversation goes with the last of its turns, and a user's journeys with the last of the user's sessions.

    Args:
        connection: A connection in a transaction.
        before_ns: The time, in nanoseconds since 1970.
        most: How many sessions at most.

    Returns:
        The ids of the sessions; none when no such session is left.
    """
    old = select(sessions.c.id, sessions.c.user_id).where(sessions.c.ended_ns < before_ns)
    found = connection.execute(old.order_by(sessions.c.ended_ns).limit(most)).all()
    ids = [row.id for row in found]
    users = {row.user_id for row in found if row.user_id is not None}
    _erase_by_session(connection, ids)
    _forget_conversations(connection, ids)
    connection.execute(delete(sessions).where(sessions.c.id.in_(ids)))
    owned = {
        row.id
        for row in connection.execute(select(sessions.c.user_id.label("id")).where(sessions.c.user_id.in_(users)))
    }
    gone = [f"session:{session_id}" for session_id in ids] + sorted(users - owned)
    connection.execute(delete(journeys).where(journeys.c.owner.in_(gone)))
    connection.execute(delete(gates).where(gates.c.key.in_([f"session:{user}" for user in users - owned])))
    return ids


def _erase_by_session(connection: Connection, session_ids: Any) -> None:
    """Erase what was in sessions; which they are is told by their ids, or by a query for them."""
    in_them = select(turns.c.started_ns, turns.c.id).where(turns.c.session_id.in_(session_ids))
    connection.execute(delete(turn_steps).where(tuple_(*turn_steps.primary_key.c).in_(in_them)))
    for table in _BY_SESSION:
        connection.execute(delete(table).where(table.c.session_id.in_(session_ids)))


def _forget_conversations(connection: Connection, session_ids: Sequence[str]) -> None:
    """Erase the conversations that these sessions had last, but for those that have turns in others."""
    in_them = conversations.c.session_id.in_(session_ids)
    latest = [
        select(table.c.session_id).where(table.c.conversation_id == conversations.c.id).order_by(table.c.number.desc())
        for table in (open_turns, turns)
    ]
    left = func.coalesce(*(query.limit(1).scalar_subquery() for query in latest))
    connection.execute(update(conversations).where(in_them, left.is_not(None)).values(session_id=left))
    numbers = select(literal("number:") + conversations.c.id).where(in_them)
    connection.execute(delete(gates).where(gates.c.key.in_(numbers)))
    connection.execute(delete(conversations).where(in_them))


def _leave_to_others(connection: Connection, user_id: str) -> None:
    """Leave the conversations that others had turns in to them, as if they had been theirs alone."""
    theirs = turns.c.conversation_id == conversations.c.id
    latest = select(turns.c.session_id).where(theirs).order_by(turns.c.number.desc()).limit(1).scalar_subquery()
    count = select(func.count()).select_from(turns).where(theirs).scalar_subquery()
    of_user = or_(
        conversations.c.user_id == user_id,
        conversations.c.session_id.in_(select(sessions.c.id).where(sessions.c.user_id == user_id)),
    )
    left = {"session_id": latest, "total_turns": count, "user_id": func.nullif(conversations.c.user_id, user_id)}
    connection.execute(update(conversations).where(of_user, exists().where(theirs)).values(left))


def erase_waiting(connection: Connection, user_id: str, erased: Erased) -> int:
    """Take what is a user's out of the outbox.

    Args:
        connection: A connection in a transaction.
        user_id: Hash of the user's id.
        erased: What was erased of the user before.

    Returns:
        How many spans and scores were taken out.
    """
    return sum(_erase_from(connection, table, user_id, erased) for table in (outbox, refused))


def _erase_from(connection: Connection, table: Table, user_id: str, erased: Erased) -> int:
    taken, after = 0, 0
    session_ids = frozenset(erased.sessions)
    while True:
        query = select(table.c.id, table.c.kind, table.c.body).where(table.c.id > after)
        rows = connection.execute(query.order_by(table.c.id).limit(_BATCH)).all()
        for row in rows:
            if row.kind == SCORE:
                score = json.loads(row.body)
                if score.get("sessionId") in session_ids or score.get("traceId") in erased.traces:
                    connection.execute(delete(table).where(table.c.id == row.id))
                    taken += 1
            else:
                taken += _take_spans(connection, table, row, user_id, session_ids)
        if len(rows) < _BATCH:
            return taken
        after = rows[-1].id


def _take_spans(connection: Connection, table: Table, row: Any, user_id: str, session_ids: Collection[str]) -> int:
    with importing():  # megabytes, which few need
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    request = ExportTraceServiceRequest()
    request.ParseFromString(row.body)
    taken = kept = 0
    for scope in (scope for resource in request.resource_spans for scope in resource.scope_spans):
        others = [span for span in scope.spans if not _is_of(span, user_id, session_ids)]
        taken += len(scope.spans) - len(others)
        kept += len(others)
        if len(others) < len(scope.spans):
            del scope.spans[:]
            scope.spans.extend(others)
    known = table.c.id == row.id
    if taken and kept:
        left = {"body": request.SerializeToString(), "items": kept}
        connection.execute(update(table).where(known).values(left))
    elif taken:
        connection.execute(delete(table).where(known))
    return taken


def _is_of(span: "Span", user_id: str, session_ids: Collection[str]) -> bool:
    said = {each.key: each.value.string_value for each in span.attributes if each.key in (a.USER_ID, a.SESSION_ID)}
    return said.get(a.USER_ID) == user_id or said.get(a.SESSION_ID) in session_ids
