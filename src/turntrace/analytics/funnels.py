"""Journeys: how far users come, how long they stay in each stage, and how many are converted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, Select, case, func, literal, select

from turntrace.analytics.asking import in_bytes, rows_of
from turntrace.analytics.confidence import interval
from turntrace.analytics.filters import ALL, Filters, in_sessions
from turntrace.analytics.quantiles import Quantiles, quantiles
from turntrace.ledger import Ledger
from turntrace.ledger.tables import journeys, stages

_MS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class FunnelStage:
    """A stage of a journey.

    Attributes:
        stage: Its name.
        number: Its place, from 1.
        entered: Users (sessions, where the user is not known) who entered it.
        stayed_p50_ms: Half of those who left it had been in it for at most so many milliseconds; None when nobody left.
        left: How many times it was left for another stage.
        reached: Users who entered it or a later one: who left it out came as far too.
    """

    stage: str
    number: int
    entered: int
    stayed_p50_ms: int | None
    left: int
    reached: int = 0


@dataclass(frozen=True, slots=True)
class Funnel:
    """A journey of many users.

    Attributes:
        name: Name of the journey.
        stages: Its stages, in order.
        begun: Users (sessions, where the user is not known) who took a step of it.
        converted: Those of them who are converted by now, in whichever session.
        conversion_p50_ms: Half of these needed at most so many milliseconds from their first step; None without any.
        conversion_turns_p50: Half of those who were converted in a turn were so in at most such a turn of their
            conversation; None without any.
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

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bounds between which the rate lies with 95 % confidence, from 0 to 1; None when nobody took a step."""
        return interval(self.converted, self.begun)


def funnels(ledger: Ledger, filters: Filters = ALL) -> list[Funnel]:
    """Return the journeys that users took a step of in these sessions, those with the most users first."""
    query = select(stages.c.name, func.count(stages.c.owner.distinct()).label("begun"))
    query = query.where(in_sessions(filters, stages.c.session_id)).group_by(stages.c.name)
    found = [(row.name, row.begun) for row in rows_of(ledger, query)]
    found.sort(key=lambda each: (-each[1], each[0]))
    return [_funnel(ledger, filters, name, begun) for name, begun in found]


def funnel(ledger: Ledger, name: str, filters: Filters = ALL) -> Funnel | None:
    """Return a journey of many users by its name, or None when nobody took a step of it in these sessions."""
    query = select(func.count(stages.c.owner.distinct()).label("begun")).where(*_steps_of(name, filters))
    begun = rows_of(ledger, query)[0].begun
    return _funnel(ledger, filters, name, begun) if begun else None


def _steps_of(name: str, filters: Filters) -> tuple[Any, Any]:
    return stages.c.name == name, in_sessions(filters, stages.c.session_id)


def _funnel(ledger: Ledger, filters: Filters, name: str, begun: int) -> Funnel:
    steps = _steps_of(name, filters)
    entered = select(stages.c.stage, func.count(stages.c.owner.distinct()).label("entered")).where(*steps)
    by_stage = {row.stage: row.entered for row in rows_of(ledger, entered.group_by(stages.c.stage))}
    known = list(dict.fromkeys([*_stages_of(ledger, name), *sorted(by_stage)]))
    came_to = _came_to(ledger, known, steps)
    stayed = quantiles(ledger, _stayed(name, filters), (50,))
    in_order = [
        FunnelStage(
            stage=stage,
            number=number,
            entered=by_stage.get(stage, 0),
            stayed_p50_ms=stayed[stage].at[50] if stage in stayed else None,
            left=stayed[stage].n if stage in stayed else 0,
            reached=sum(owners for furthest, owners in came_to.items() if furthest >= number),
        )
        for number, stage in enumerate(known, start=1)
    ]
    return Funnel(name, in_order, begun, *_converted(ledger, name, steps))


def _came_to(ledger: Ledger, known: Sequence[str], steps: tuple[Any, Any]) -> dict[int, int]:
    """Return how many users came how far, by the number of the furthest stage that they entered."""
    number = case({stage: number for number, stage in enumerate(known, start=1)}, value=stages.c.stage)
    furthest = select(func.max(number).label("number")).where(*steps).group_by(stages.c.owner).subquery()
    query = select(furthest.c.number, func.count().label("owners")).group_by(furthest.c.number)
    return {row.number: row.owners for row in rows_of(ledger, query)}


def _stayed(name: str, filters: Filters) -> Select[Any]:
    """Return the query for how long a stage was stayed in, which stands with the step that left it.

    The stage that was left is that of the step before, in whichever session that was.
    """
    before = func.lag(stages.c.stage).over(partition_by=stages.c.owner, order_by=stages.c.id)
    columns = stages.c.session_id, stages.c.time_in_stage_ms.label("value"), stages.c.stage.label("to")
    step = select(before.label("stage"), *columns).where(stages.c.name == name).subquery().c
    left = select(step.stage.label("part"), step.value)
    return left.where(step.stage != step.to, step.value.is_not(None), in_sessions(filters, step.session_id))


def _converted(ledger: Ledger, name: str, steps: tuple[Any, Any]) -> tuple[int, int | None, int | None]:
    """Return how many were converted, in what time, and in which turn."""
    owners = select(stages.c.owner).where(*steps)
    of_it = journeys.c.name == name, journeys.c.owner.in_(owners), journeys.c.converted_ns.is_not(None)

    def middle(value: Any) -> Quantiles | None:
        values = select(value.label("value")).where(*of_it, value.is_not(None))
        return quantiles(ledger, values, (50,)).get(None)

    took = middle((journeys.c.converted_ns - journeys.c.started_ns) // literal(_MS, BigInteger))
    turn = middle(journeys.c.conversion_turn)
    if took is None:
        return 0, None, None
    return took.n, took.at[50], None if turn is None else turn.at[50]


def _stages_of(ledger: Ledger, name: str) -> list[str]:
    """Return the stages of a journey as it was begun last."""
    begun = journeys.c.started_ns.desc(), in_bytes(journeys.c.owner)
    rows = rows_of(ledger, select(journeys.c.stages).where(journeys.c.name == name).order_by(*begun).limit(1))
    return json.loads(rows[0].stages) if rows else []
