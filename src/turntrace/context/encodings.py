"""Tiktoken's encodings from files that are shipped with turntrace, so that counting tokens needs no network.

tiktoken downloads the ranks of an encoding when it is first used. Here they are read from the package instead, and
checked against the SHA-256 that tiktoken itself expects of what it downloads. Nothing is ever downloaded.
"""

import base64
import hashlib
import lzma
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Final

from turntrace.errors import ConfigurationError, TurntraceError

if TYPE_CHECKING:
    import tiktoken

DEFAULT_ENCODING: Final = "o200k_base"
"""The encoding for models that tiktoken does not know."""


@dataclass(frozen=True, slots=True)
class _Definition:
    """What tiktoken's ``tiktoken_ext/openai_public.py`` says about an encoding; a test compares the two."""

    sha256: str
    pattern: str
    special_tokens: dict[str, int]


_DEFINITIONS: Final = {
    "o200k_base": _Definition(
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        pattern="|".join(
            [
                r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
                r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
                r"""\p{N}{1,3}""",
                r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
                r"""\s*[\r\n]+""",
                r"""\s+(?!\S)""",
                r"""\s+""",
            ]
        ),
        special_tokens={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
    "cl100k_base": _Definition(
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        pattern=(
            r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
            r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
        ),
        special_tokens={
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
}

_built: "dict[str, tiktoken.Encoding]" = {}
_lock = threading.Lock()


def encoding(name: str) -> "tiktoken.Encoding":
    """Return an encoding, the same object each time; the first time in a process it is built, in about 0.3 seconds.

    Args:
        name: ``o200k_base`` or ``cl100k_base``.

    Raises:
        ConfigurationError: If turntrace ships no encoding of that name.
        TurntraceError: If its file is missing or damaged.
    """
    found = _built.get(name)
    if found is not None:
        return found
    if name not in _DEFINITIONS:
        raise ConfigurationError(
            f"The encoding {name!r} is not shipped with turntrace. Shipped are {', '.join(_DEFINITIONS)}; for another, "
            "count with tiktoken.get_encoding(...), which downloads it."
        )
    with _lock:
        if name not in _built:
            _built[name] = _build(name, _DEFINITIONS[name])
        return _built[name]


@lru_cache(maxsize=256)
def encoding_name(model: str) -> str | None:
    """Return the name of the encoding that a model uses, when tiktoken knows it and turntrace ships it, else None.

    Args:
        model: Name of the model, as its provider, a router (``openai/gpt-4o``) or LangChain (``openai:gpt-4o``)
            writes it.
    """
    from tiktoken.model import encoding_name_for_model

    for name in names_of(model):
        try:
            found = encoding_name_for_model(name)
        except KeyError:
            continue
        return found if found in _DEFINITIONS else None
    return None


def names_of(model: str) -> tuple[str, ...]:
    """Return the names that a model may be known by: as it is, and without what is put around it.

    Around it are a router's or LangChain's name of the vendor, ``ft:gpt-4o:org::id``, and ``gpt-4o:extended``.
    """
    bare = model.rpartition("/")[2]
    before, _, after = bare.partition(":")
    names = (model, bare, after, after.partition(":")[0], before)
    return tuple(dict.fromkeys(name for name in names if name)) or (model,)


def encoding_for_model(model: str) -> "tiktoken.Encoding":
    """Return the encoding that a model uses, as far as tiktoken knows it, else ``o200k_base``.

    For models of other vendors, and for those older than ``cl100k_base``, the count is an estimate.

    Args:
        model: Name of the model, as `encoding_name` takes it.

    Raises:
        TurntraceError: If the encoding's file is missing or damaged.
    """
    return encoding(encoding_name(model) or DEFAULT_ENCODING)


_PIECE: Final = 50_000
_SEAM: Final = re.compile(r"(?<=[^\W_]) (?=[^\W\d_])")
_SEAM_WITHIN: Final = 5_000


def count_text(text: str, encoding: "tiktoken.Encoding") -> int:
    """Return how many tokens a text has.

    What looks like a special token (``<|endoftext|>``) is text like any other, and half of a surrogate pair counts as
    the replacement character.

    A text of over 100,000 characters is counted in pieces that are cut between two words, where tiktoken cuts too.
    Where 5,000 characters have no two words it is cut all the same, which makes a difference of at most a few tokens a
    piece: tiktoken as a whole fails on hundreds of thousands of spaces, and slows down on other endless runs.

    Args:
        text: The text.
        encoding: The encoding to count in, from `encoding` or `encoding_for_model`.
    """
    if len(text) <= 2 * _PIECE:
        return len(encoding.encode_ordinary(text))
    return sum(len(encoding.encode_ordinary(piece)) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        seam = _SEAM.search(text, start + _PIECE, start + _PIECE + _SEAM_WITHIN)
        end = start + _PIECE if seam is None else seam.start()
        yield text[start:end]
        start = end
    yield text[start:]


def _build(name: str, definition: _Definition) -> "tiktoken.Encoding":
    import tiktoken

    ranks = {}
    for line in _read(name, definition.sha256).splitlines():
        token, _, rank = line.partition(b" ")
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        name, pat_str=definition.pattern, mergeable_ranks=ranks, special_tokens=definition.special_tokens
    )


def _read(name: str, sha256: str) -> bytes:
    """Return the ranks of an encoding as the bytes that tiktoken would have downloaded."""
    file = resources.files(__package__).joinpath("ranks", f"{name}.tiktoken.xz")
    try:
        content = lzma.decompress(file.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise _damaged(name, f"it cannot be read ({type(error).__name__})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise _damaged(name, f"the SHA-256 of what it holds is {found}, and tiktoken expects {sha256}")
    return content


def _damaged(name: str, why: str) -> TurntraceError:
    return TurntraceError(
        f"The file {name}.tiktoken.xz of turntrace cannot be used: {why}. "
        "Install turntrace again: pip install --force-reinstall turntrace."
    )
