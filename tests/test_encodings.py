"""Counting tokens without a network: the shipped encodings are tiktoken's own."""

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

import turntrace
from turntrace.context import count_text, encoding, encoding_for_model
from turntrace.errors import ConfigurationError

NAMES = ("o200k_base", "cl100k_base")
URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
PACKAGE = Path(turntrace.__file__).parent
RANKS = PACKAGE / "context" / "ranks"

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "I'll book it; don't you think they've paid?  I'D RATHER NOT.",
    "x" * 3000,
    "1234567890 12 345 6 7,890.12",
    "line one\nline two\r\n\r\n\ttabbed   \n   trailing   ",
    "<|endoftext|> and <|fim_prefix|>, <|endofprompt|>",
    "Grüße aus Österreich, où êtes-vous? ¿Qué tal?",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff",
    "مرحبا بالعالم שלום עולם",
    '{"reservation_id":"OBUT9V","flights":[{"flight_number":"HAT069","date":"2024-05-20"}]}',
    "\x00\x01\x1b[31m",
]


@pytest.fixture(scope="module")
def tiktokens_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tiktoken.Encoding]]:
    """Give tiktoken's encodings as tiktoken builds them, from a cache that holds what it would have downloaded."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in NAMES:
        content = lzma.decompress((RANKS / f"{name}.tiktoken.xz").read_bytes())
        (cache / hashlib.sha1(URL.format(name).encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        # tiktoken checks the SHA-256 of what is in its cache, and would go to the network if it were another.
        yield {name: tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]()) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_an_encoding_is_tiktokens(name: str, tiktokens_own: dict[str, tiktoken.Encoding]) -> None:
    ours, theirs = encoding(name), tiktokens_own[name]
    assert ours.name == theirs.name
    assert ours.n_vocab == theirs.n_vocab
    assert ours.special_tokens_set == theirs.special_tokens_set
    special = sorted(theirs.special_tokens_set)
    assert [ours.encode_single_token(token) for token in special] == [
        theirs.encode_single_token(token) for token in special
    ]
    assert ours.token_byte_values() == theirs.token_byte_values()
    for text in TEXTS:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode_ordinary(text)) == text


@given(text=st.text(max_size=200))
def test_any_text_has_the_tokens_that_tiktoken_gives_it(text: str, tiktokens_own: dict[str, tiktoken.Encoding]) -> None:
    for name in NAMES:
        assert encoding(name).encode_ordinary(text) == tiktokens_own[name].encode_ordinary(text)


def test_the_hashes_and_patterns_are_those_in_tiktokens_source() -> None:
    source = Path(openai_public.__file__).read_text(encoding="utf-8")
    for name in NAMES:
        content = lzma.decompress((RANKS / f"{name}.tiktoken.xz").read_bytes())
        assert f'"{hashlib.sha256(content).hexdigest()}"' in source


def test_an_encoding_is_built_once() -> None:
    assert encoding("o200k_base") is encoding("o200k_base")
    assert encoding_for_model("gpt-4o") is encoding("o200k_base")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o", "o200k_base"),
        ("gpt-4o-2024-08-06", "o200k_base"),
        ("openai/gpt-4o-mini", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("openai/gpt-4-0613", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("gpt-oss-120b", "o200k_base"),
        ("text-davinci-003", "o200k_base"),
        ("claude-sonnet-4-5", "o200k_base"),
        ("some-model-of-tomorrow", "o200k_base"),
        ("", "o200k_base"),
    ],
)
def test_a_model_has_its_encoding_and_an_unknown_one_the_newest(model: str, name: str) -> None:
    assert encoding_for_model(model).name == name


def test_text_that_looks_like_a_special_token_is_text() -> None:
    chosen = encoding("o200k_base")
    assert count_text("<|endoftext|>", chosen) > 1
    assert count_text("a<|endoftext|>b", chosen) == len(chosen.encode("a<|endoftext|>b", disallowed_special=()))


def test_half_a_surrogate_pair_counts_as_the_replacement_character() -> None:
    chosen = encoding("o200k_base")
    assert count_text("a\ud83d b", chosen) == count_text("a\ufffd b", chosen)


def test_an_encoding_that_is_not_shipped_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'p50k_base' is not shipped .* Shipped are o200k_base, cl100k_base"):
        encoding("p50k_base")


def _run(code: str, path: Path | None = None) -> str:
    environment = {**os.environ, "HTTPS_PROXY": "", "TIKTOKEN_CACHE_DIR": ""}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_that_need_an_encoding_at_once_get_the_same_without_a_network() -> None:
    code = """
import socket, threading
def refuse(*args, **kwargs): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from turntrace.context import encoding
start, got = threading.Barrier(8), []
def work():
    start.wait()
    got.append(encoding("cl100k_base"))
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(got), len(set(map(id, got))), encoding("o200k_base").n_vocab)
"""
    assert _run(code).split() == ["8", "1", "200019"]


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    copied = Path(shutil.copytree(PACKAGE, tmp_path / "turntrace", ignore=ignored)) / "context" / "ranks"
    code = f"""
from pathlib import Path
from turntrace import TurntraceError
from turntrace.context import encoding
def use():
    try:
        encoding("o200k_base")
    except TurntraceError as error:
        print(error)
file, other = Path({str(copied / "o200k_base.tiktoken.xz")!r}), Path({str(copied / "cl100k_base.tiktoken.xz")!r})
file.write_bytes(file.read_bytes()[:-1000])
use()
file.write_bytes(other.read_bytes())
use()
file.unlink()
use()
"""
    cut, swapped, missing = _run(code, tmp_path).splitlines()
    assert "o200k_base.tiktoken.xz of turntrace cannot be used: it cannot be read (LZMAError)" in cut
    assert "pip install --force-reinstall turntrace" in cut
    assert "and tiktoken expects 446a9538cb6c348e" in swapped
    assert "it cannot be read (FileNotFoundError)" in missing
