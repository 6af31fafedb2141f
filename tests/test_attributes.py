"""The words: every name once, with the type that the design gives it."""

import ast
import re
from pathlib import Path

import pytest

import turntrace
from turntrace import attributes as a

SOURCE = Path(turntrace.__file__).parent

# The table "The words" of the design, for session, user, conversation, turn and context; `*` marks what every span
# carries.
WORDS = """
session.id * str
session.start_time str
session.end_time str
session.type str
session.channel * str
session.client_version str
session.locale str
session.previous_id str
session.end_reason str
session.duration_ms int
session.active_ms int
session.wait_ms int
session.total_turns int
session.total_tokens int
session.total_cost_usd float
session.avg_turn_latency_ms float
session.avg_turn_tokens float
session.user_satisfaction float
session.inactive_timeout bool
session.idle_time_ms int
user.id * str
user.tier * str
user.org_id * str
user.sessions_total int
user.avg_session_length float
user.retention_days int
conversation.id * str
gen_ai.conversation.id * str
conversation.session_id str
conversation.topic * str
conversation.turn_number * int
turn.number * int
conversation.total_turns int
conversation.messages_in_context int
conversation.context_tokens int
conversation.context_window_pct float
turn.id * str
turn.role str
turn.input_length int
turn.output_length int
turn.input_type str
turn.output_type str
turn.has_attachments bool
turn.agent_runs int
turn.tool_calls int
turn.llm_calls int
turn.input_tokens int
turn.output_tokens int
turn.cost_usd float
turn.latency_ms int
turn.wait_ms int
turn.time_to_first_token_ms int
turn.status str
turn.intent str
turn.step int
context.current_tokens int
context.new_tokens int
context.limit int
context.tokens int
context.pruned bool
context.messages_pruned int
context.tokens_pruned int
context.strategy str
context.trigger str
context.tokenizer str
context.estimate_error_pct float
"""
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
LATER = {"turn.forked_from", "turn.attempt", "turn.handoff_to"}
"""Words that the design's table does not have, of what was built since."""

TABLE = {(parts := line.split())[0]: (TYPES[parts[-1]], "*" in parts) for line in WORDS.split("\n") if line}
OURS = ("session.", "user.", "conversation.", "turn.", "context.")

# Names of OpenTelemetry and Langfuse that turntrace sets beside its own.
FOREIGN = ("gen_ai.", "langfuse.", "error.")


@pytest.mark.parametrize("name", TABLE)
def test_every_word_of_the_design_is_there_with_its_type(name: str) -> None:
    kind, every = TABLE[name]
    assert a.ATTRIBUTES[name].type is kind
    assert a.ATTRIBUTES[name].every is every


def test_no_word_of_these_groups_is_there_that_the_design_does_not_know() -> None:
    assert {name for name in a.ATTRIBUTES if name.startswith(OURS)} - set(TABLE) == LATER


def test_every_name_is_one_of_ours_or_of_a_standard() -> None:
    groups = (*OURS, "journey.", "dropoff.")
    assert [name for name in a.ATTRIBUTES if not name.startswith((*groups, *FOREIGN))] == []


def test_every_span_carries_exactly_the_starred_names() -> None:
    assert sorted(a.EVERY_SPAN) == sorted(name for name, (_, starred) in TABLE.items() if starred)
    assert set(a.REQUIRED_ON_EVERY_SPAN) <= set(a.EVERY_SPAN)


def test_only_what_may_be_unknown_is_not_required_on_every_span() -> None:
    missing = set(a.EVERY_SPAN) - set(a.REQUIRED_ON_EVERY_SPAN)
    assert missing == {"user.id", "user.tier", "user.org_id", "session.channel", "conversation.topic"}


def test_every_entry_is_complete_and_stands_under_its_own_name() -> None:
    for name, entry in a.ATTRIBUTES.items():
        assert entry.name == name
        assert entry.meaning
        assert entry.on
        assert entry.source


def test_a_number_of_time_or_money_says_its_unit() -> None:
    units = {"_ms": "ms", "_usd": "USD", "_days": "whole days"}
    for name, entry in a.ATTRIBUTES.items():
        for ending, unit in units.items():
            if name.endswith(ending) and entry.type in (int, float):
                assert entry.unit == unit, name


def test_every_name_is_declared_once() -> None:
    declared = re.findall(r'_name\(\s*"([^"]+)"', (SOURCE / "attributes.py").read_text(encoding="utf-8"))
    assert sorted(declared) == sorted(set(declared)) == sorted(a.ATTRIBUTES)


def test_no_two_constants_hold_the_same_name() -> None:
    held = [value for key, value in vars(a).items() if key.isupper() and isinstance(value, str)]
    assert sorted(held) == sorted(set(held))


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        a.ATTRIBUTES["session.id"] = a.ATTRIBUTES["turn.id"]  # type: ignore[index]


def _literals(path: Path) -> list[tuple[str, int]]:
    return [
        (node.value, node.lineno)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_no_file_spells_an_attribute_name_itself() -> None:
    names = {*a.ATTRIBUTES, a.LANGFUSE_METADATA_PREFIX}
    found = [
        f"{path.relative_to(SOURCE)}:{line} {text}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "attributes.py"
        for text, line in _literals(path)
        if text in names
    ]
    assert found == []
