"""What an app, a model or a stranger may hand over: texts and objects that break what is not careful."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

PLANTED = (
    "<script>alert(1)</script>",
    "</script><!--",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "\u2028\u2029",
    "\x1b[31mred\x1b]0;title\x07",
    "line\r\nWARNING forged",
    "=1+1",
    "@SUM(A1)",
    "-2+3",
    "'; DROP TABLE turntrace_sessions; --",
    '" OR ""="',
    "%s %(name)s {0} {name}",
    "[bold]markup[/bold] :smile:",
    "../../etc/passwd",
    "\u202egnp.exe",
)
"""Texts that something would interpret: a browser, a terminal, a log, a spreadsheet, a database, a template."""

BROKEN = ("\ud800", "a\udcff", "\x00", "a\x00b", "\ufeff", "", " ", "x" * 10_000, "\U0001f600" * 300, "\u00e9\u4e2d")
"""Texts that UTF-8, a database or an id cannot hold, or that are none or too many."""


class NoText:
    """An object that has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        return "NoText()"


class NoEquals:
    """An object that cannot be compared, and is neither true nor false: as an array of numbers is."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


def nested(depth: int) -> Any:
    """Return a list of a list of a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


texts = st.sampled_from(PLANTED) | st.sampled_from(BROKEN) | st.text(max_size=8)
numbers = (
    st.sampled_from([-1, 0, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**30, 10**400, float("nan"), float("inf"), -0.0, 0.1])
    | st.integers()
    | st.floats()
)
plain = st.none() | st.booleans() | numbers | texts | st.binary(max_size=8)
"""What JSON and MessagePack can nearly hold."""

values = st.recursive(
    plain
    | st.builds(NoText)
    | st.builds(NoEquals)
    | st.builds(object)
    | st.builds(nested, st.just(300))
    | st.just(int),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.sampled_from(["type", "text", "id", "name", "data", "url"]) | texts, inner, max_size=3)
    ),
    max_leaves=6,
)
"""Anything."""


def steady(examples: int) -> settings:
    """Return settings with which the same examples are tried each time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
