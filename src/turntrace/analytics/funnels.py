"""Journeys: how far users come, how long they stay in each stage, and how many are converted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, literal, select

from turntrace.analytics.asking import quantiles, rows_of
from turntrace.analytics.filters import ALL, Filters, in_sessions
from turntrace.ledger import Ledger
from turntrace.ledger.tables import journeys, stages


@dataclass(frozen=True, slots=True)
class FunnelStage:
    """A stage of a journey.

    Attributes:
        stage: Its name.
        number: Its place, from 1.
        entered: Users (sessions, where the user is not known) who entered it.
        stayed_p50_ms: Half of those who left it had been in it for at most so many milliseconds; None when nobody left.
        left: How many times it was left for another stage.
    """

    stage: str
    number: int
    entered: int
    stayed_p50_ms: int | None
    left: int


@dataclass(frozen=True, slots=True)
class Funnel:
    """A journey of many users.

    Attributes:
        name: Name of the journey.
        stages: Its stages, in order.
        begun: Users (sessions, where the user is not known) who took a step of it.
        converted: Those of them who were converted.
        conversion_p50_ms: Half of these needed at most so many milliseconds from their first step; None without any.
        conversion_turns_p50: Half of these were converted in at most such a turn of their conversation.
    """

    name: str
    stages: Sequence[FunnelStage]
    begun: int
    converted: int
    conversion_p50_ms: int | None
    conversion_turns_p50: int | None

    @property
    def rate(self) -> float:
        """Converted ones among those who took a step, from 0 to 1."""
        return self.converted / self.begun if self.begun else 0.0


def funnels(ledger: Ledger, filters: Filters = ALL) -> list[Funnel]:
    """Return the journeys that users took a step of in these sessions, those with the most users first."""
    query = select(stages.c.name, func.count(stages.c.owner.distinct()).label("begun"))
    query = query.where(in_sessions(filters, stages.c.session_id)).group_by(stages.c.name)
    found = [(row.name, row.begun) for row in rows_of(ledger, query)]
    found.sort(key=lambda each: (-each[1], each[0]))
    return [_funnel(ledger, filters, name, begun) for name, begun in found]


def funnel(ledger: Ledger, name: str, filters: Filters = ALL) -> Funnel | None:
    """Return a journey of many users by its name, or None when nobody took a step of it in these sessions."""
    return next((each for each in funnels(ledger, filters) if each.name == name), None)


def _funnel(ledger: Ledger, filters: Filters, name: str, begun: int) -> Funnel:
    of_it = stages.c.name == name, in_sessions(filters, stages.c.session_id)
    entered = select(stages.c.stage, func.count(stages.c.owner.distinct()).label("entered")).where(*of_it)
    by_stage = {row.stage: row.entered for row in rows_of(ledger, entered.group_by(stages.c.stage))}
    stayed = quantiles(ledger, _stayed(of_it), (50,))
    converted = _converted(ledger, of_it, name)
    known = [*_stages_of(ledger, name), *sorted(by_stage)]
    in_order = [
        FunnelStage(
            stage=stage,
            number=number,
            entered=by_stage.get(stage, 0),
            stayed_p50_ms=None if stage not in stayed else stayed[stage].p50,
            left=0 if stage not in stayed else int(stayed[stage].n),
        )
        for number, stage in enumerate(dict.fromkeys(known), start=1)
    ]
    return Funnel(name, in_order, begun, *converted)


def _stayed(of_it: Any) -> Any:
    """Return the query for how long a stage was stayed in: it stands with the step that left it."""
    before = func.lag(stages.c.stage).over(
        partition_by=(stages.c.owner, stages.c.name), order_by=(stages.c.at_ns, stages.c.id)
    )
    steps = select(before.label("stage"), stages.c.time_in_stage_ms.label("value"), stages.c.stage.label("to"))
    step = steps.where(*of_it).subquery().c
    left = select(step.stage.label("part"), step.value)
    return left.where(step.stage.is_not(None), step.value.is_not(None), step.stage != step.to)


def _converted(ledger: Ledger, of_it: Any, name: str) -> tuple[int, int | None, int | None]:
    """Return how many were converted, in what time, and in which turn."""
    owners = select(stages.c.owner).where(*of_it).distinct()
    took = (journeys.c.converted_ns - journeys.c.started_ns) // 1_000_000
    found: list[int | None] = []
    n = 0
    for value in (took, journeys.c.conversion_turn):
        values = select(literal(0).label("part"), value.label("value")).where(
            journeys.c.name == name,
            journeys.c.owner.in_(owners),
            journeys.c.converted_ns.is_not(None),
            value.is_not(None),
        )
        row = quantiles(ledger, values, (50,)).get(None)
        n = n if row is None else max(n, int(row.n))
        found.append(None if row is None else row.p50)
    return n, found[0], found[1]


def _stages_of(ledger: Ledger, name: str) -> list[str]:
    """Return the stages of a journey as it was begun last."""
    query = select(journeys.c.stages).where(journeys.c.name == name).order_by(journeys.c.started_ns.desc()).limit(1)
    rows = rows_of(ledger, query)
    return json.loads(rows[0].stages) if rows else []
