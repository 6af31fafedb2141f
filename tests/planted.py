"""Secrets that nobody else would write, and the search for them in every byte that leaves.

A secret has two halves: one of letters and digits, which no escaping changes, and one of characters that JSON, URLs
and HTML all change. Both begin as all other secrets of the test do, so that a search for two beginnings finds any.
"""

import base64
import hashlib
import html
import json
import logging
import random
import re
import secrets as system
import socket
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Self
from urllib.parse import quote, quote_plus

_LETTERS: Final = "bcdfghjklmnpqrstvwxz0123456789"
_CHANGED: Final = "\"\\/<>&%+é☂'\t="
_MARK: Final = 10
_LONGEST: Final = 1_000
_BEFORE: Final = 32
"""What stands before the half that is escaped: the half of letters, and a bar for each time that it was escaped."""
_OWN: Final = 6
_GUESSED: Final = {"user"}
"""Those that somebody may guess, and find confirmed by a hash without a key."""


class Secrets:
    """The secrets of one test, by what they stand for; each is made when it is first asked for."""

    def __init__(self) -> None:
        self._random = random.Random(system.token_bytes(16))
        self._beginning = self._some(_LETTERS, _MARK)
        self._odd_beginning = self._some(_CHANGED, _MARK)
        self._halves: dict[str, tuple[str, str]] = {}

    def _some(self, characters: str, count: int) -> str:
        return "".join(self._random.choices(characters, k=count))

    def __getitem__(self, kind: str) -> str:
        """Return the text of a secret."""
        return "".join(self.halves(kind))

    def halves(self, kind: str) -> tuple[str, str]:
        """Return the two halves of a secret."""
        if kind not in self._halves:
            own = self._beginning + self._some(_LETTERS, _OWN), self._odd_beginning + self._some(_CHANGED, _OWN)
            self._halves[kind] = own
        return self._halves[kind]

    def replaced(self, text: str) -> str:
        """Return a text with each secret in it replaced, as a redactor does."""
        for kind, halves in self._halves.items():
            for half in halves:
                text = text.replace(half, f"[{len(kind)}]")
        return text

    def found_in(self, blob: bytes) -> set[str]:
        """Return which secrets stand in some bytes, in any form; ``?`` for a part of one that cannot be told."""
        found: set[str] = set()
        for layer in _layers(blob):
            found |= self._named(layer)
            found |= self._hashed(layer)
        return found

    def _named(self, layer: bytes) -> set[str]:
        found: set[str] = set()
        names = {halves[0].encode(): kind for kind, halves in self._halves.items()}
        for hit in re.findall(self._beginning.encode() + rb".{0,%d}" % _OWN, layer, re.DOTALL):
            found.add(names.get(hit, "?"))
        beginnings = {*_forms(self._beginning), *_forms(self._odd_beginning)} - {self._beginning.encode()}
        around = b"\n".join({part for form in beginnings for part in _around(form, layer)})
        if around:
            halves = [(half, kind) for kind, pair in self._halves.items() for half in pair]
            found |= {kind for half, kind in halves if any(form in around for form in _forms(half))} or {"?"}
        return found

    def _hashed(self, layer: bytes) -> set[str]:
        """Look for hashes without a key, by which whoever guesses a text is told that it is right."""
        found = set()
        for kind in _GUESSED & self._halves.keys():
            for text in {self[kind], *self._halves[kind]}:
                for name in ("sha256", "sha1", "md5"):
                    digest = hashlib.new(name, text.encode(), usedforsecurity=False)
                    if digest.hexdigest()[:32].encode() in layer or digest.digest()[:16] in layer:
                        found.add(f"{kind}, hashed")
        return found


def _around(form: bytes, layer: bytes) -> Iterator[bytes]:
    """Give what stands around each place where a form of a beginning is: all of a secret, however it is written."""
    at = layer.find(form)
    while at >= 0:
        yield layer[max(0, at - _BEFORE) : at + _LONGEST]
        at = layer.find(form, at + len(form))


@cache
def _forms(text: str) -> set[bytes]:
    """Return the ways in which a text may be written: raw, and as JSON, URLs, HTML, Python and base64 write it."""
    raw = text.encode()
    written = {text, html.escape(text), html.escape(text, quote=False)} | _as_python(text)
    written |= {quote(text), quote(text, safe=""), quote_plus(text), quote_plus(quote(text, safe=""))}
    for each in list(written):
        for ascii_only in (True, False):
            once = json.dumps(each, ensure_ascii=ascii_only)[1:-1]
            twice = {json.dumps(once, ensure_ascii=then)[1:-1] for then in (True, False)}
            written |= {once, html.escape(once), *twice, *_as_python(once)}
    found = {each.encode() for each in (*written, raw.hex(), raw.hex().upper())}
    found |= {text.encode("utf-16-le"), text.encode("utf-16-be")}
    for before in range(3):  # in base64 a text looks different at each place of a group of three
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            begin, end = (4 if before else 0), (before + len(raw)) // 3 * 4
            found.add(encode(b"\0" * before + raw)[begin:end])
    return found


def _as_python(text: str) -> set[str]:
    """Return how Python may write a text and its bytes: its quotation marks depend on what else stands there."""
    shown = {repr("\"'" + text)[4:-1], ascii("\"'" + text)[4:-1], repr(b"\"'" + text.encode())[5:-1]}
    return shown | {each.replace("\\'", "'") for each in shown}


_PACKED: Final = re.compile(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]")
_BASE64: Final = re.compile(rb"(?:H4sI|eJ)[A-Za-z0-9+/_-]{20,}")


def _layers(blob: bytes, depth: int = 3) -> Iterator[bytes]:
    """Give some bytes, and what is packed in them, by gzip or zlib, perhaps in base64."""
    yield blob
    if depth == 0:
        return
    for start in [hit.start() for hit in _PACKED.finditer(blob)]:
        with suppress(zlib.error):
            yield from _layers(zlib.decompressobj(47).decompress(blob[start:]), depth - 1)
    for hit in _BASE64.findall(blob):
        with suppress(ValueError):
            packed = base64.urlsafe_b64decode(hit[: len(hit) // 4 * 4].replace(b"+", b"-").replace(b"/", b"_"))
            yield from _layers(packed, depth - 1)


_FORMATTER: Final = logging.Formatter()
_USUAL: Final = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime"}


class Logs(logging.Handler):
    """Keeps all that is logged at DEBUG and above by anybody, tracebacks and arguments included."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        more = {name: value for name, value in record.__dict__.items() if name not in _USUAL}
        self.lines.append(f"{record.name}: {_FORMATTER.format(record)}\n{record.args!r} {more!r}")

    @property
    def text(self) -> str:
        """All that was logged."""
        return "\n".join(self.lines)

    @contextmanager
    def of_everybody(self) -> Iterator[Self]:
        """Hear all loggers in a block."""
        every = [logging.getLogger(), *(each for each in _loggers())]
        before = [(each, each.level) for each in every]
        deaf = [each for each in every if not each.propagate]
        for logger in every:
            logger.setLevel(logging.DEBUG)
        for logger in (every[0], *deaf):
            logger.addHandler(self)
        try:
            yield self
        finally:
            for logger in (every[0], *deaf):
                logger.removeHandler(self)
            for logger, level in before:
                logger.setLevel(level)


def _loggers() -> Iterable[logging.Logger]:
    return [each for each in logging.Logger.manager.loggerDict.values() if isinstance(each, logging.Logger)]


@dataclass(frozen=True)
class Sent:
    """A request as it went over the wire: its head, and its body as it came and unpacked."""

    head: bytes
    body: bytes


class Wire:
    """Stands between a client and a server, and keeps every byte that the client sends.

    Args:
        port: The server's port.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: list[bytearray] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        for each in (self._listening, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    @property
    def raw(self) -> bytes:
        """All that clients have sent."""
        return b"\n".join(bytes(stream) for stream in self._streams)

    def requests(self) -> list[Sent]:
        """Return the requests."""
        return [request for stream in self._streams for request in _requests(bytes(stream))]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._open += [client, server]
            kept = bytearray()
            self._streams.append(kept)
            for source, target, keep in ((client, server, kept), (server, client, bytearray())):
                threading.Thread(target=_pass_on, args=(source, target, keep), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, keep: bytearray) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            keep += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _requests(stream: bytes) -> Iterator[Sent]:
    while stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        size = 0 if length is None else int(length[1])
        assert b"transfer-encoding: chunked" not in head.lower(), "chunks are not read here"
        body, stream = rest[:size], rest[size:]
        assert len(body) == size, "a request came in part"
        packed = re.search(rb"(?i)\r\ncontent-encoding: *(\w+)", head)
        yield Sent(head, body if packed is None else zlib.decompressobj(47).decompress(body))


def every_text(value: Any) -> str:
    """Return all that an object shows of itself."""
    return f"{value!r}\n{value!s}"
