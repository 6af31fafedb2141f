"""The outbox: what waits to be sent, who may send it, and how much of it there may be."""

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, Connection, Select, bindparam, delete, func, insert, select, update

from turntrace.ledger.engine import Database, Prepared
from turntrace.ledger.schema import insert_for
from turntrace.ledger.tables import leases, meta, outbox, refused
from turntrace.waiting import SCORE, SPANS, Claim, OutboxItem, OutboxStatus, Refusal, Waiting

_LEASE: Final = "outbox"
_DROPPED: Final = "outbox_dropped"
_MEASURED_EVERY: Final = 16
"""The size is measured when so many parts of what is allowed may have been added."""
_ROWS: Final = ("kind", "body", "items", "created_ns")
_COLUMNS: Final = (outbox.c.id, *(outbox.c[name] for name in _ROWS))
_SIZES: Final = select(outbox.c.id, func.length(outbox.c.body)).order_by(outbox.c.id).limit(bindparam("most"))
_UP_TO: Final = select(*_COLUMNS).where(outbox.c.id <= bindparam("last")).order_by(outbox.c.id)
_ANY: Final = select(outbox.c.id).limit(1)
_DONE: Final = delete(outbox).where(outbox.c.id == bindparam("done"))
_HELD: Final = (
    update(leases)
    .where(leases.c.name == _LEASE, leases.c.owner == bindparam("holder"))
    .values(until_ns=bindparam("until", type_=leases.c.until_ns.type))
)
_WHY_LENGTH: Final = 500


class Dropped(NamedTuple):
    """What was dropped: how many spans and scores, and their bytes."""

    items: int
    size: int


class StoredOutbox:
    """The outbox in the ledger's database. It keeps `turntrace.waiting.Outbox`.

    Args:
        database: The ledger's database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._take = Prepared(_taken(database.dialect.name), database.dialect)
        self._hold = Prepared(_HELD, database.dialect)
        self._grown: float = float("inf")  # what is there from before is measured first
        self._has_more = False

    # --- sending ------------------------------------------------------------------------------------------------------
    def claim(self, owner: str, *, lease_s: float, max_rows: int, max_bytes: int, kind: str | None = None) -> Claim:
        """Take the lease, and return the oldest rows.

        Args:
            owner: Who asks.
            lease_s: Seconds for which nobody else may send.
            max_rows: How many rows at most.
            max_bytes: How many bytes at most; a row that is larger comes alone.
            kind: Only rows of this kind; None for all.
        """
        has_more, self._has_more = self._has_more, False
        if not has_more and not self.waits():
            return Claim()  # without making writers wait
        with self._database.writing() as connection:
            busy_s = self._take_lease(connection, owner, lease_s)
            if busy_s > 0:
                return Claim(busy_s=busy_s)
            last, total = 0, 0
            sizes = connection.execute(_of_kind(_SIZES, kind), {"most": max_rows + 1}).all()
            for row_id, size in sizes[:max_rows]:
                total += size
                if last and total > max_bytes:
                    break
                last = row_id
            if not sizes:  # another process has sent them since
                self._hold_lease(connection, owner, 0)
                return Claim(is_all=True)
            rows = connection.execute(_of_kind(_UP_TO, kind), {"last": last}).all()
            items = tuple(OutboxItem(*row) for row in rows)
            return Claim(items, is_all=last == sizes[-1].id)

    def renew(self, owner: str, *, lease_s: float) -> bool:
        """Go on holding the lease; tell whether it is still held.

        Args:
            owner: Who holds it.
            lease_s: Seconds from now for which nobody else may send.
        """
        with self._database.writing() as connection:
            return self._take_lease(connection, owner, lease_s) == 0

    def settle(self, owner: str, sent: Sequence[int], apart: Sequence[Refusal], *, lease_s: float) -> None:
        """Take out what was sent and set apart what was refused.

        Args:
            owner: Who sent it.
            sent: Ids of the rows that are done with.
            apart: What is to be set apart of them.
            lease_s: Seconds for which the lease is held on; 0 gives it back.
        """
        with self._database.writing() as connection:
            for refusal in apart:
                values = {name: getattr(refusal.item, name) for name in _ROWS}
                connection.execute(insert(refused).values(values | {"why": refusal.why[:_WHY_LENGTH]}))
            if sent:
                connection.execute(_DONE, [{"done": row_id} for row_id in sent])
            self._hold_lease(connection, owner, lease_s)

    def _take_lease(self, connection: Connection, owner: str, lease_s: float) -> float:
        """Take or renew the lease; return for how many seconds another one has it, or 0."""
        now = time.time_ns()
        cursor = connection.connection.cursor()
        if self._take.run(cursor, {"taker": owner, "until": _in(lease_s), "now": now}).fetchone() is not None:
            return 0.0
        until = connection.execute(select(leases.c.until_ns).where(leases.c.name == _LEASE)).scalar_one()
        return max(float(until - now) / 1e9, 0.001)

    def _hold_lease(self, connection: Connection, owner: str, lease_s: float) -> None:
        """Hold the lease on for so many seconds; 0 gives it back."""
        values = {"holder": owner, "until": _in(lease_s) if lease_s else 0}
        self._hold.run(connection.connection.cursor(), values)

    def release(self, owner: str) -> None:
        """Give the lease back."""
        self.settle(owner, [], [], lease_s=0)

    def try_again(self) -> int:
        """Let what was set apart wait again; return how many rows that were."""
        with self._database.writing() as connection:
            columns = [refused.c[name] for name in _ROWS]
            connection.execute(insert(outbox).from_select(_ROWS, select(*columns).order_by(refused.c.id)))
            return connection.execute(delete(refused)).rowcount

    # --- looking ------------------------------------------------------------------------------------------------------
    def waits(self) -> bool:
        """Tell whether anything waits."""
        with self._database.reading() as connection:
            return connection.execute(_ANY).first() is not None

    def status(self) -> OutboxStatus:
        """Return what is in it."""
        with self._database.reading() as connection:
            sums = func.count(), func.sum(outbox.c["items"]), func.sum(func.length(outbox.c.body))
            kinds = select(outbox.c.kind, *sums, func.min(outbox.c.created_ns)).group_by(outbox.c.kind)
            found = {kind: Waiting(*map(int, row)) for kind, *row in connection.execute(kinds)}
            apart = select(refused.c.why, func.sum(refused.c["items"])).group_by(refused.c.why).order_by(refused.c.why)
            return OutboxStatus(
                spans=found.get(SPANS, Waiting()),
                scores=found.get(SCORE, Waiting()),
                refused=tuple((why, int(items)) for why, items in connection.execute(apart)),
                dropped=_dropped(connection),
            )

    # --- its bound ----------------------------------------------------------------------------------------------------
    def note_growth(self, size: int) -> None:
        """Note that this process put in so many bytes."""
        self._grown += size
        self._has_more = self._has_more or size > 0

    def trim(self, max_bytes: int) -> Dropped:
        """Drop the oldest where more waits than is allowed; it is measured now and then.

        Args:
            max_bytes: How many bytes may wait.

        Returns:
            What was dropped.
        """
        if self._grown * _MEASURED_EVERY < max_bytes:
            return Dropped(0, 0)
        self._grown = 0
        with self._database.reading() as connection:
            total = connection.execute(select(func.sum(func.length(outbox.c.body)))).scalar() or 0
        return self._drop(total - max_bytes) if total > max_bytes else Dropped(0, 0)

    def _drop(self, excess: int) -> Dropped:
        oldest = select(outbox.c.id, outbox.c["items"], func.length(outbox.c.body)).order_by(outbox.c.id)
        items = size = last_id = 0
        with self._database.writing(many_rows=True) as connection:
            for row_id, some, length in connection.execute(oldest).all():
                last_id, items, size = row_id, items + some, size + length
                if size >= excess:
                    break
            connection.execute(delete(outbox).where(outbox.c.id <= last_id))
            so_far = str(_dropped(connection) + items)
            noted = insert_for(connection.dialect.name, meta).values(key=_DROPPED, value=so_far)
            connection.execute(noted.on_conflict_do_update(index_elements=[meta.c.key], set_={"value": so_far}))
        return Dropped(items, size)


def _of_kind(query: Select[Any], kind: str | None) -> Select[Any]:
    return query if kind is None else query.where(outbox.c.kind == kind)


def _taken(dialect: str) -> Any:
    taker, until = bindparam("taker", type_=leases.c.owner.type), bindparam("until", type_=BigInteger())
    wanted = {"owner": taker, "until_ns": until}
    is_free = (leases.c.owner == taker) | (leases.c.until_ns <= bindparam("now", type_=BigInteger()))
    return (
        insert_for(dialect, leases)
        .values(name=_LEASE, **wanted)
        .on_conflict_do_update(index_elements=[leases.c.name], set_=wanted, where=is_free)
        .returning(leases.c.owner)
    )


def _in(seconds: float) -> int:
    return time.time_ns() + int(seconds * 1e9)


def _dropped(connection: Connection) -> int:
    return int(connection.execute(select(meta.c.value).where(meta.c.key == _DROPPED)).scalar() or 0)
