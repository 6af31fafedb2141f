"""Spans of ours that are written down whole, when they have ended, where nobody but turntrace listens to them.

A span of OpenTelemetry's SDK tells its processors when it starts and when it ends, checks each attribute, and is read
attribute by attribute to become bytes. That is most of what a turn costs behind the app's back. A step whose span
nobody asked for while it ran is known whole when its span is to be made: then its bytes are written at once, the same
that the SDK and its encoder would have made of it.
"""

import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Status, StatusCode

from turntrace.attributes import SCOPE_NAME, AttributeValue
from turntrace.forking import importing

_INTERNAL: Final = b"\x30\x01"
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200
_SHORT: Final = 200
_pack_double: Final = struct.Struct("<d").pack


@dataclass(frozen=True, slots=True)
class Around:
    """What stands around the spans of a provider in OTLP, encoded.

    Attributes:
        resource: The resource, as a field of ``ResourceSpans``.
        scope: Our scope, as a field of ``ScopeSpans``.
        schema: The resource's schema URL, as a field of ``ResourceSpans``; empty without one.
    """

    resource: bytes
    scope: bytes
    schema: bytes

    @classmethod
    def of(cls, resource: Resource) -> "Around":
        """Return what stands around the spans of a provider with a resource."""
        held = [(_text(key), _value(value)) for key, value in resource.attributes.items()]
        pairs = [key + _field(b"\x12", value) for key, value in held if key is not None and value is not None]
        is_plain = len(pairs) == len(held)
        written = b"".join(_field(b"\x0a", pair) for pair in pairs) if is_plain else _as_the_sdk_writes(resource)
        return cls(
            resource=_field(b"\x0a", written),
            scope=_field(b"\x0a", _field(b"\x0a", SCOPE_NAME.encode())),
            schema=_field(b"\x1a", _utf8(resource.schema_url)) if resource.schema_url else b"",
        )


def _as_the_sdk_writes(resource: Resource) -> bytes:
    """Return a resource with values that spans of ours do not have, as bytes and mappings."""
    with importing():  # megabytes, which few need
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    span = ReadableSpan("any", context=trace.SpanContext(1, 1, is_remote=False), resource=resource)
    written: bytes = encode_spans([span]).resource_spans[0].resource.SerializeToString()
    return written


class WrittenSpan(trace.NonRecordingSpan):
    """A span of something that has ended; its end writes it down.

    Args:
        around: What stands around it.
        name: Its name.
        context: Its ids.
        parent: Those of its parent; None without one.
        attributes: Its attributes.
        start_ns: When it started, in nanoseconds since 1970.
        ended: Is handed the span when it is ended.
    """

    def __init__(
        self,
        around: Around,
        name: str,
        context: trace.SpanContext,
        parent: trace.SpanContext | None,
        attributes: Mapping[str, AttributeValue],
        start_ns: int,
        ended: Callable[["WrittenSpan"], None],
    ) -> None:
        super().__init__(context)
        self._ended = ended
        self.around = around
        self.parent = parent
        self._name = name
        self._attributes = dict(attributes)
        self._start_ns = start_ns
        self._end_ns: int | None = None
        self._status = b"\x7a\x00"

    def is_recording(self) -> bool:
        """Tell whether it has not been ended."""
        return self._end_ns is None

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes, until it is ended."""
        if self._end_ns is None:
            self._attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute, until it is ended."""
        self.set_attributes({key: value})

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set its status, until it is ended."""
        code = status.status_code if isinstance(status, Status) else status
        words = status.description if isinstance(status, Status) else description
        if self._end_ns is None:
            message = _field(b"\x12", _utf8(words)) if words and code is StatusCode.ERROR else b""
            self._status = _field(b"\x7a", message + b"\x18" + _varint(code.value))

    def end(self, end_time: int | None = None) -> None:
        """End it."""
        if self._end_ns is None:
            self._end_ns = time.time_ns() if end_time is None else end_time
            self._ended(self)

    def to_bytes(self) -> bytes:
        """Return it as OTLP's ``Span`` in protobuf."""
        context, parent = self.get_span_context(), self.parent
        flags = _HAS_IS_REMOTE | (_IS_REMOTE if parent is not None and parent.is_remote else 0)
        return b"".join(
            (
                b"\x0a\x10",
                context.trace_id.to_bytes(16),
                b"\x12\x08",
                context.span_id.to_bytes(8),
                b"" if parent is None else b"\x22\x08" + parent.span_id.to_bytes(8),
                _field(b"\x2a", _utf8(self._name)),
                _INTERNAL,
                struct.pack("<BQBQ", 0x39, self._start_ns, 0x41, self._end_ns or self._start_ns),
                *(_attribute(key, value) for key, value in self._attributes.items()),
                self._status,
                struct.pack("<HI", 0x0185, flags),
            )
        )


def to_request(spans: Iterable[WrittenSpan]) -> bytes:
    """Return spans as an OTLP ``ExportTraceServiceRequest`` in protobuf."""
    by_place: dict[Around, list[bytes]] = {}
    for span in spans:
        by_place.setdefault(span.around, []).append(_field(b"\x12", span.to_bytes()))
    return b"".join(
        _field(b"\x0a", around.resource + _field(b"\x12", around.scope + b"".join(written)) + around.schema)
        for around, written in by_place.items()
    )


# --- protobuf ---------------------------------------------------------------------------------------------------------
def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


_LENGTHS: Final = [_varint(length) for length in range(2_048)]


def _field(tag: bytes, content: bytes) -> bytes:
    length = len(content)
    return tag + (_LENGTHS[length] if length < len(_LENGTHS) else _varint(length)) + content


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _attribute(key: str, value: Any) -> bytes:
    """Return an attribute as a field of a span; nothing of one that OTLP cannot hold, as the SDK's encoder does."""
    kind = type(value)
    if kind is bool or (kind is str and len(value) <= _SHORT):
        return _known_attribute(key, value)
    if kind is int and 0 <= value < 2**63:
        number = _LENGTHS[value] if value < len(_LENGTHS) else _varint(value)
        return _head(key, b"\x18", len(number)) + number
    if kind is float:
        return _head(key, b"\x21", 8) + _pack_double(value)
    return _new_attribute(key, value)


def _new_attribute(key: str, value: Any) -> bytes:
    held = _text(value) if type(value) is str else _value(value)
    return b"" if held is None else _head(key, b"", len(held)) + held


@lru_cache(1024)
def _head(key: str, tag: bytes, length: int) -> bytes:
    """Return what stands before the value of an attribute: its name, and the value's tag and length in bytes."""
    inside = _field(b"\x0a", _utf8(key)) + b"\x12" + _varint(len(tag) + length) + tag
    return b"\x4a" + _varint(len(inside) + length) + inside


_known_attribute = lru_cache(1024)(_new_attribute)
"""The ids of a turn, and words that stand on each span, are written once."""


def _text(value: str) -> bytes | None:
    try:
        return _field(b"\x0a", value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return None


def _value(value: Any) -> bytes | None:
    """Return OTLP's ``AnyValue``, or None of what it cannot hold."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value & 0xFFFF_FFFF_FFFF_FFFF) if -(2**63) <= value < 2**63 else None
    if isinstance(value, float):
        return b"\x21" + _pack_double(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        held = [_value(each) for each in value]
        if all(each is not None for each in held):
            return _field(b"\x2a", b"".join(_field(b"\x0a", each) for each in held if each is not None))
    return None
