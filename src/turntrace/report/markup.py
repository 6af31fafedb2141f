"""HTML made of elements: text is escaped wherever it is not markup made here."""

import html
import json
from typing import Any, Final

_VOID: Final = ("br", "input", "link", "meta")
_IN_SCRIPT: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


class Markup(str):
    """A text that is HTML already; only `element`, `joined` and `raw` make it."""

    __slots__ = ()


def raw(text: str) -> Markup:
    """Say that a text is HTML: one of our own, with nothing from outside in it."""
    return Markup(text)


def joined(*children: str | None) -> Markup:
    """Return children one after the other: markup as it is, other text escaped, None left out."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def element(name: str, /, *children: str | None, **attributes: str | bool | None) -> Markup:
    """Return an element.

    Args:
        name: Its name.
        children: What is in it; text is escaped.
        attributes: Its attributes: ``_`` in a name stands for ``-`` (and at its end for nothing, as in ``class_``);
            None and False leave one out, True writes it without a value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(*children)}</{name}>")


def json_for_script(value: Any) -> Markup:
    """Return a value as JSON that can stand in a ``<script>``: nothing in it can end the script or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in _IN_SCRIPT.items():
        text = text.replace(character, escape)
    return Markup(text)


def _attribute(name: str, value: str | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(value)}"'


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text)
