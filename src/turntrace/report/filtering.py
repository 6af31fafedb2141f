"""The filters of the report: as a page states them, as a form, and as a query string says them."""

from collections.abc import Mapping, Sequence
from typing import Final

from turntrace.analytics import Choices, Filters, day_of, users_that_begin
from turntrace.errors import ConfigurationError, IdentityError
from turntrace.ledger import Ledger
from turntrace.report.markup import Markup, element
from turntrace.report.words import day_or_moment, shortened, visible

_OPEN: Final = "open"
_LONGEST: Final = 200
_MAY_LACK: Final = ("tier", "org", "topic", "model")

FIELDS: Final = {
    "since": "since_ns",
    "until": "until_ns",
    "channel": "channel",
    "tier": "tier",
    "org": "org_id",
    "topic": "topic",
    "model": "model",
    "end_reason": "end_reason",
    "user": "user_id",
    "conversation": "conversation_id",
    "error": "error",
    "failed": "failed",
    "unsatisfied": "unsatisfied",
}
"""The fields of the form, and what of `Filters` each says."""

NOT_KNOWN: Final = "(not known)"
"""What a field says for sessions of which it is not known."""

_WORDS: Final = {
    "since": "from",
    "until": "before",
    "org": "organisation",
    "end_reason": "ended by",
    "user": "user (hash)",
    "error": "turns that ended with",
    "failed": "turns",
    "unsatisfied": "feedback",
}

_YES: Final = {"failed": "failed or abandoned", "unsatisfied": "below 50%"}
"""What a filter says that is asked for or not."""


def filters_of(asked: Mapping[str, Sequence[str]], base: Filters) -> Filters:
    """Read filters from a query string.

    Args:
        asked: The values of each of its fields; unknown fields are an error.
        base: What holds for fields that are not in it; an empty one takes a filter away.

    Raises:
        ConfigurationError: If a field is not known, or its value cannot be used.
    """
    changed: dict[str, str | int | bool | None] = {}
    for name, values in asked.items():
        if name not in FIELDS:
            raise ConfigurationError(f"There is no filter {name!r:.40}. Allowed are {', '.join(FIELDS)}.")
        value = values[-1]
        if len(value) > _LONGEST:
            raise ConfigurationError(f"The filter {name} has {len(value):,} characters. Allowed are {_LONGEST}.")
        changed[FIELDS[name]] = _value(name, value)
    return base.of(**changed)


def with_whole_user(filters: Filters, ledger: Ledger) -> Filters:
    """Return filters whose user is a hash on record, where they name the beginning of one.

    Raises:
        IdentityError: If no user has such a hash, or several have.
    """
    begins = filters.user_id
    if not begins:
        return filters
    found = users_that_begin(ledger, begins)
    if begins in found:
        return filters
    if not found:
        raise IdentityError(
            f"No user has a hash that begins with {begins!r}. Leave the field empty for all users; the tables of "
            "sessions show the beginnings of their users' hashes."
        )
    if len(found) > 1:
        raise IdentityError(f"Several users have hashes that begin with {begins!r}: type more of it.")
    return filters.of(user_id=found[0])


def _value(name: str, value: str) -> str | int | bool | None:
    if not value.strip():
        return None
    if name in _YES:
        return True
    if name in ("since", "until"):
        return day_of(value, name)
    return "" if value == NOT_KNOWN else value


def applied(filters: Filters) -> Markup:
    """Return what states the filters that were applied."""
    said = [(name, value) for name in FIELDS if (value := _shown(filters, name)) is not None]
    if not said:
        return element("p", "No filters: everything on record.", class_="about")
    items = (
        element("li", f"{_WORDS.get(name, name)} ", element("strong", element("bdi", visible(value) or "not known")))
        for name, value in said
    )
    return element("ul", *items, class_="applied", aria_label="Filters that were applied")


def filter_form(filters: Filters, choices: Choices) -> Markup:
    """Return the form of the served page."""
    fields = (
        _time("since", filters),
        _time("until", filters),
        _choice("channel", filters, choices.channel),
        _choice("tier", filters, choices.tier),
        _choice("org", filters, choices.org_id),
        _choice("topic", filters, choices.topic),
        _choice("model", filters, choices.model),
        _choice("end_reason", filters, (_OPEN, *(reason for reason in choices.end_reason if reason != _OPEN))),
        _text("user", filters.user_id),
        _text("conversation", filters.conversation_id),
        _text("error", filters.error),
        *(_yes(name, filters) for name in _YES),
    )
    actions = element(
        "div", element("button", "Show", type="submit"), element("a", "Clear", href=_cleared()), class_="actions"
    )
    return element("form", *fields, actions, method="get", action="/", id="filters", class_="filters")


def _cleared() -> str:
    """Return the address without filters, also without those that the page was served with."""
    return "/?" + "&".join(f"{name}=" for name in FIELDS)


def _label(name: str, field: Markup) -> Markup:
    words = _WORDS.get(name, name)
    zone = " (UTC)" if name in ("since", "until") else ""
    return element("label", words[0].upper() + words[1:] + zone, field)


def _time(name: str, filters: Filters) -> Markup:
    """Return a field for a day and a time, in which a browser writes nothing but both."""
    value = _shown(filters, name)
    at = value if value is None or "T" in value else f"{value}T00:00"
    return _label(name, element("input", type="datetime-local", name=name, value=at))


def _text(name: str, value: str | None) -> Markup:
    return _label(name, element("input", type="text", name=name, value=value, autocomplete="off"))


def _yes(name: str, filters: Filters) -> Markup:
    chosen = bool(getattr(filters, FIELDS[name]))
    options = element("option", "any", value=""), element("option", _YES[name], value="yes", selected=chosen)
    return _label(name, element("select", *options, name=name))


def _choice(name: str, filters: Filters, values: Sequence[str]) -> Markup:
    chosen = getattr(filters, FIELDS[name])
    present = values if not chosen or chosen in values else (chosen, *values)
    options = [
        element("option", shortened(visible(value), 60), value=value, selected=value == chosen) for value in present
    ]
    if name in _MAY_LACK:
        options.append(element("option", "not known", value=NOT_KNOWN, selected=chosen == ""))
    return _label(name, element("select", element("option", "any", value=""), *options, name=name))


def _shown(filters: Filters, name: str) -> str | None:
    value: int | str | bool | None = getattr(filters, FIELDS[name])
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return _YES[name] if value else None
    return day_or_moment(value).replace(" ", "T")
