"""The tables of the ledger and the version of their schema.

Times are nanoseconds since 1970 in UTC (``*_ns``), durations are milliseconds (``*_ms``), money is US dollars. All
tables are prefixed ``turntrace_``, so the ledger can live in a database beside other tables.
"""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)

SCHEMA_VERSION: Final = 8
"""Version of the tables below; a change of them raises it and adds a migration to `turntrace.ledger.schema`."""

metadata = MetaData()

meta = Table(
    "turntrace_meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

sessions = Table(
    "turntrace_sessions",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("user_id", String(64)),
    Column("channel", String(200), nullable=False),
    Column("type", String(40), nullable=False),
    Column("tier", String(200)),
    Column("org_id", String(200)),
    Column("locale", String(200)),
    Column("client_version", String(200)),
    Column("previous_id", String(200)),
    Column("sessions_total", Integer, nullable=False),
    Column("started_ns", BigInteger, nullable=False),
    Column("last_activity_ns", BigInteger, nullable=False),
    Column("ended_ns", BigInteger),
    Column("end_reason", String(200)),
    Column("announced", Boolean, nullable=False, default=False),
    Column("total_turns", Integer, nullable=False, default=0),
    Column("failed_turns", Integer, nullable=False, default=0),
    Column("llm_calls", Integer, nullable=False, default=0),
    Column("tool_calls", Integer, nullable=False, default=0),
    Column("input_tokens", BigInteger, nullable=False, default=0),
    Column("output_tokens", BigInteger, nullable=False, default=0),
    Column("total_cost_usd", Double, nullable=False, default=0.0),
    Column("unpriced_calls", Integer, nullable=False, default=0),
    Column("active_ms", BigInteger, nullable=False, default=0),
    Column("wait_ms", BigInteger, nullable=False, default=0),
    Column("prunings", Integer, nullable=False, default=0, server_default="0"),
    Column("feedback_sum", Double, nullable=False, default=0.0, server_default="0"),
    Column("feedback_count", Integer, nullable=False, default=0, server_default="0"),
    Column("dropoff", Boolean),
    Column("last_turn", Integer),
    Column("last_intent", String(200)),
    Column("last_action", String(20)),
    Column("last_turn_ns", BigInteger),
    Column("journey_name", String(200)),
    Column("journey_stage", String(200)),
    Column("journey_converted", Boolean),
    Column("journey_conversion_turn", Integer),
    Column("journey_conversion_time_ms", BigInteger),
    Index("turntrace_sessions_user", "user_id", "channel", "started_ns"),
    Index("turntrace_sessions_started", "started_ns"),
    Index("turntrace_sessions_open", "ended_ns", "last_activity_ns"),
)

conversations = Table(
    "turntrace_conversations",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("session_id", String(200), ForeignKey("turntrace_sessions.id"), nullable=False),
    Column("user_id", String(64)),
    Column("topic", String(200)),
    Column("total_turns", Integer, nullable=False),
    Column("started_ns", BigInteger, nullable=False),
    Column("last_activity_ns", BigInteger, nullable=False),
)

# Where writers are side by side (PostgreSQL), a row of these is what those meet at who would do the same at once: open
# a session for one user, or give out the next number of one conversation. On SQLite writers take turns.
gates = Table(
    "turntrace_gates",
    metadata,
    Column("key", String(220), primary_key=True),
    Column("number", Integer, nullable=False, default=0),
)

# The turns that run now. A turn begins in the app's own thread, so its beginning writes one small row into a small
# table without further indexes, which is one page; its end moves it to the turns.
open_turns = Table(
    "turntrace_open_turns",
    metadata,
    Column("conversation_id", String(200), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("id", String(200), nullable=False),
    Column("session_id", String(200), nullable=False),
    Column("user_id", String(64)),
    Column("role", String(20), nullable=False),
    Column("started_ns", BigInteger, nullable=False),
    Column("trace_id", String(32), nullable=False),
    Column("root_span_id", String(16), nullable=False),
    Column("late", Text),  # what others add to it while it runs, as JSON
    Column("own", Text),  # what it began with that its session does not tell, as JSON; mostly nothing
    sqlite_with_rowid=False,
)

turns = Table(
    "turntrace_turns",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("conversation_id", String(200), nullable=False),
    Column("number", Integer, nullable=False),
    Column("session_id", String(200), nullable=False),
    Column("user_id", String(64)),
    Column("status", String(20), nullable=False),
    Column("started_ns", BigInteger, nullable=False),
    Column("ended_ns", BigInteger, nullable=False),
    Column("trace_id", String(32), nullable=False),
    Column("root_span_id", String(16), nullable=False),
    Column("role", String(20), nullable=False),
    Column("input_length", Integer),
    Column("output_length", Integer),
    Column("input_type", String(40)),
    Column("output_type", String(40)),
    Column("has_attachments", Boolean),
    Column("intent", String(200)),
    Column("agent_runs", Integer, nullable=False, default=0),
    Column("tool_calls", Integer, nullable=False, default=0),
    Column("llm_calls", Integer, nullable=False, default=0),
    Column("input_tokens", BigInteger, nullable=False, default=0),
    Column("output_tokens", BigInteger, nullable=False, default=0),
    Column("cost_usd", Double, nullable=False, default=0.0),
    Column("unpriced_calls", Integer, nullable=False, default=0),
    Column("latency_ms", BigInteger, nullable=False, default=0),
    Column("wait_ms", BigInteger, nullable=False, default=0),
    Column("time_to_first_token_ms", BigInteger),
    Column("model", String(200)),
    Column("error", String(200)),
    Column("spans", Integer, nullable=False, default=0),
    Column("steps", Text),  # as versions before 8 wrote them; see `turn_steps`
    Column("context_tokens", Integer),
    Column("context_messages", Integer),
    Column("context_limit", Integer),
    Column("prunings", Integer, nullable=False, default=0, server_default="0"),
    Column("messages_pruned", Integer, nullable=False, default=0, server_default="0"),
    Column("tokens_pruned", Integer, nullable=False, default=0, server_default="0"),
    Column("counted_tokens", BigInteger, nullable=False, default=0, server_default="0"),
    Column("counted_of_tokens", BigInteger, nullable=False, default=0, server_default="0"),
    Column("forked_from", String(200)),
    Column("checkpoint_id", String(200)),
    Column("own", Text),  # as of the turns that run
    UniqueConstraint("conversation_id", "number", name="turntrace_turns_number"),
)

# The turns of a session, in order, with all that is asked of many turns: that is read from here, a third of the table.
_ASKED_OF_MANY: Final = (
    *("number", "status", "intent", "model", "latency_ms", "time_to_first_token_ms", "input_tokens", "output_tokens"),
    *("cost_usd", "unpriced_calls", "context_tokens", "context_limit", "counted_tokens", "counted_of_tokens"),
)
turn_figures = Index(
    "turntrace_turns_figures", *(turns.c[name] for name in ("session_id", "started_ns", *_ASKED_OF_MANY))
)

# The steps of a turn, as JSON. They are longer than all else that is known of it and only looked at: whoever asks about
# all turns reads past none of them. Those that are in the row of the turn stay there, so that a large ledger is brought
# up in seconds, and processes of the version before write on.
turn_steps = Table(
    "turntrace_steps",
    metadata,
    # When the turn began comes first: ids come in no order, and a large index costs least where it is added to.
    Column("started_ns", BigInteger, primary_key=True, autoincrement=False),
    Column("turn_id", String(200), primary_key=True),
    Column("steps", Text, nullable=False),
)
are_steps_of_turn = (turn_steps.c.started_ns == turns.c.started_ns) & (turn_steps.c.turn_id == turns.c.id)

# Those that wait for a person; the index holds no others. PostgreSQL is told by `know_postgresql`.
_waits = turns.c.status == text("'interrupted'")
waiting_turns = Index("turntrace_turns_waiting", turns.c.session_id, sqlite_where=_waits)

# Those that failed or were abandoned, with what is asked of them, so that nobody reads all turns for the few. Databases
# know that the index has all of them by the very words of this condition, with its values in it.
is_failing = turns.c.status.in_([literal_column("'failed'"), literal_column("'abandoned'")])
failing_turns = Index(
    "turntrace_turns_failing",
    *(turns.c[name] for name in ("started_ns", "id", "session_id", "number", "status", "intent", "error")),
    sqlite_where=is_failing,
)

# Every decision about a model's window, a row each. In `dropped` stand, as JSON, the ids of the messages that this
# decision was the first to drop: one that prunes only what the model is given drops the same ones at every call.
decisions = Table(
    "turntrace_decisions",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("turn_id", String(200), nullable=False),
    Column("session_id", String(200), nullable=False),
    Column("conversation_id", String(200), nullable=False),
    Column("turn_number", Integer, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("trigger", String(20)),
    Column("strategy", String(200)),
    Column("tokenizer", String(40)),
    Column("model", String(200)),
    Column("limit", Integer),
    Column("tokens_before", Integer),
    Column("tokens_after", Integer),
    Column("new_tokens", Integer),
    Column("messages_before", Integer, nullable=False),
    Column("messages_after", Integer, nullable=False),
    Column("messages_pruned", Integer, nullable=False),
    Column("dropped", Text),
    Column("replaced", Text),
    Column("added", Text),
    Column("duration_us", Integer, nullable=False),
    Index("turntrace_decisions_session", "session_id", "at_ns"),
)

# A journey belongs to the user, or without one to the session, and goes on in later sessions.
journeys = Table(
    "turntrace_journeys",
    metadata,
    Column("owner", String(220), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("stages", Text, nullable=False),
    Column("stage", String(200), nullable=False),
    Column("started_ns", BigInteger, nullable=False),
    Column("entered_ns", BigInteger, nullable=False),
    Column("converted_ns", BigInteger),
    Column("conversion_turn", Integer),
)

stages = Table(
    "turntrace_stages",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("owner", String(220), nullable=False),
    Column("name", String(200), nullable=False),
    Column("stage", String(200), nullable=False),
    Column("stage_number", Integer, nullable=False),
    Column("total_stages", Integer, nullable=False),
    Column("session_id", String(200), nullable=False),
    Column("turn_number", Integer),
    Column("at_ns", BigInteger, nullable=False),
    Column("time_in_stage_ms", BigInteger),
    Column("is_back", Boolean, nullable=False),
    Column("converted", Boolean, nullable=False),
    Index("turntrace_stages_session", "session_id", "at_ns"),
    Index("turntrace_stages_journey", "owner", "name", "at_ns"),
)

feedback = Table(
    "turntrace_feedback",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("session_id", String(200), nullable=False),
    Column("turn_id", String(200)),
    Column("name", String(200), nullable=False),
    Column("value", Double, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Index("turntrace_feedback_session", "session_id"),
)


def _sendable() -> list[Column[Any]]:
    """Return the columns of what can be sent."""
    return [
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        Column("kind", String(20), nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("items", Integer, nullable=False),
        Column("created_ns", BigInteger, nullable=False),
    ]


outbox = Table("turntrace_outbox", metadata, *_sendable(), sqlite_autoincrement=True)

# What Langfuse would not take, set apart with its words.
refused = Table("turntrace_refused", metadata, *_sendable(), Column("why", Text, nullable=False))

# Who sends from the outbox, and until when it must have said that it lives.
leases = Table(
    "turntrace_leases",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("until_ns", BigInteger, nullable=False),
)


def know_postgresql() -> None:
    """Say what the tables say in the words of PostgreSQL too; its dialect takes long to load, and few need it."""
    waiting_turns.dialect_options["postgresql"]["where"] = _waits
    failing_turns.dialect_options["postgresql"]["where"] = is_failing
