"""Journeys in the ledger: where a user stands, and each step of the way."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection, RowMapping, insert, select, update

from turntrace.ledger.schema import insert_for
from turntrace.ledger.tables import journeys, sessions, stages
from turntrace.records import elapsed_ms
from turntrace.summaries import JourneySummary, StageEntered

_COLUMNS: Final = ("name", "stage", "started_ns", "entered_ns", "converted_ns", "conversion_turn")


def journey_from(row: RowMapping) -> JourneySummary:
    """Read where a journey stands."""
    return JourneySummary(**{name: row[name] for name in _COLUMNS}, stages=tuple(json.loads(row["stages"])))


def journey_of(connection: Connection, owner: str, name: str, *, to_change: bool = False) -> JourneySummary | None:
    """Return where a journey of a user stands, or None when it has not begun."""
    query = select(journeys).where(journeys.c.owner == owner, journeys.c.name == name)
    row = connection.execute(query.with_for_update() if to_change else query).mappings().first()
    return None if row is None else journey_from(row)


def journeys_of(connection: Connection, owner: str) -> dict[str, JourneySummary]:
    """Return the journeys of a user by name."""
    query = select(journeys).where(journeys.c.owner == owner).order_by(journeys.c.started_ns, journeys.c.name)
    return {row["name"]: journey_from(row) for row in connection.execute(query).mappings()}


def enter_stage(
    connection: Connection,
    owner: str,
    name: str,
    all_stages: Sequence[str],
    stage: str | None,
    *,
    session_id: str,
    turn_number: int | None,
    at_ns: int,
    converts: bool,
) -> StageEntered | None:
    """Enter a stage of a journey, or convert it.

    Args:
        connection: A connection in a transaction.
        owner: The user's hash, or what stands for the session of an unknown user.
        name: Name of the journey.
        all_stages: Its stages, in order.
        stage: The stage that is entered; None to stay where it stands.
        session_id: The session in which this is.
        turn_number: Number of the turn in which this is.
        at_ns: When, in nanoseconds since 1970.
        converts: Whether the journey is converted by it.

    Returns:
        What was entered; None when the journey stands there already, or is converted already.
    """
    first = stage or all_stages[0]
    begun = insert_for(connection.dialect.name, journeys).values(
        owner=owner, name=name, stages=json.dumps(all_stages), stage=first, started_ns=at_ns, entered_ns=at_ns
    )
    is_new = connection.execute(begun.on_conflict_do_nothing().returning(journeys.c.name)).first() is not None
    before = journey_of(connection, owner, name, to_change=True)
    assert before is not None
    now = stage or before.stage
    if not is_new and (before.converted if converts else now == before.stage):
        return None
    journey = replace(before, stages=tuple(all_stages), stage=now)
    if now != before.stage:
        journey = replace(journey, entered_ns=at_ns)
    if converts and not journey.converted:
        journey = replace(journey, converted_ns=max(at_ns, journey.started_ns), conversion_turn=turn_number)
    _keep(connection, owner, journey, session_id)
    entered = StageEntered(
        name=name,
        stage=now,
        stage_number=journey.stage_number,
        total_stages=len(all_stages),
        at_ns=at_ns,
        time_in_stage_ms=None if is_new else elapsed_ms(before.entered_ns, at_ns),
        converted=journey.converted,
        conversion_turn=journey.conversion_turn,
        conversion_time_ms=journey.conversion_time_ms,
        is_back=not is_new and journey.stage_number < replace(journey, stage=before.stage).stage_number,
    )
    step = {column: getattr(entered, column) for column in _STEP_COLUMNS}
    connection.execute(insert(stages).values(owner=owner, session_id=session_id, turn_number=turn_number, **step))
    return entered


_STEP_COLUMNS: Final = tuple(column.name for column in stages.c if column.name in StageEntered.__slots__)


def _keep(connection: Connection, owner: str, journey: JourneySummary, session_id: str) -> None:
    known = (journeys.c.owner == owner, journeys.c.name == journey.name)
    values = {name: getattr(journey, name) for name in _COLUMNS if name != "name"}
    connection.execute(update(journeys).where(*known).values(**values, stages=json.dumps(journey.stages)))
    connection.execute(
        update(sessions)
        .where(sessions.c.id == session_id)
        .values(
            journey_name=journey.name,
            journey_stage=journey.stage,
            journey_converted=journey.converted,
            journey_conversion_turn=journey.conversion_turn,
            journey_conversion_time_ms=journey.conversion_time_ms,
        )
    )


def hand_over(connection: Connection, before: str, owner: str) -> None:
    """Make journeys another owner's, but for those that this one has by the same name."""
    has = select(journeys.c.name).where(journeys.c.owner == owner)
    known = select(journeys.c.name).where(journeys.c.owner == before, journeys.c.name.not_in(has))
    names = list(connection.execute(known).scalars())
    for table in (journeys, stages) if names else ():
        connection.execute(update(table).where(table.c.owner == before, table.c.name.in_(names)).values(owner=owner))


def unconverted_in(connection: Connection, owner: str, session_id: str) -> list[str]:
    """Return the names of the journeys that a session took a step of and that are not converted."""
    query = (
        select(journeys.c.name)
        .where(
            journeys.c.owner == owner,
            journeys.c.converted_ns.is_(None),
            journeys.c.name.in_(select(stages.c.name).where(stages.c.session_id == session_id)),
        )
        .order_by(journeys.c.name)
    )
    return list(connection.execute(query).scalars())


def steps_in(connection: Connection, session_id: str) -> list[StageEntered]:
    """Return the steps of journeys in a session, in order."""
    query = select(stages).where(stages.c.session_id == session_id).order_by(stages.c.id)
    rows = connection.execute(query).mappings()
    return [StageEntered(**{name: row[name] for name in _STEP_COLUMNS}) for row in rows]
