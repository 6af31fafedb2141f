"""What messages, their images, calls and tools count, and that nothing counts twice or by an old count."""

import base64
import gc
import hashlib
import json
import logging
import lzma
import math
import random
import re
import struct
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    ChatMessageChunk,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

from turntrace import ContextTracker
from turntrace.context import MessageCounter, calibration, count_text, encoding, window_of
from turntrace.context.counter import read_messages
from turntrace.context.encodings import encoding_name
from turntrace.context.images import UNKNOWN_SIZE, image_tokens, read_image
from turntrace.errors import ConfigurationError, ContextError

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
NAMES = ("o200k_base", "cl100k_base")
MODELS = {"o200k_base": "gpt-4o", "cl100k_base": "gpt-4"}
URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
FRAME = 3
ROLE = 1


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    for name in NAMES:
        encoding(name)


@pytest.fixture(autouse=True)
def _no_factors() -> Iterator[None]:
    calibration.forget()
    yield
    calibration.forget()


@pytest.fixture
def counter() -> MessageCounter:
    return MessageCounter("gpt-4o")


def named(value: object) -> str:
    """Return the id of a test, the same in every run."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def tokens(text: str, name: str = "o200k_base") -> int:
    return len(encoding(name).encode_ordinary(text))


def call(name: str, args: dict[str, Any]) -> AIMessage:
    return AIMessage("", tool_calls=[tool_call(name=name, args=args, id="call-1")])


def of_content(content: Any, model: str = "gpt-4o") -> int:
    """Return what the content of a message counts beside its frame."""
    return MessageCounter(model).count(HumanMessage(content)) - FRAME - ROLE


# --- the recorded conversations ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recorded(airline: Path) -> list[dict[str, Any]]:
    lines = airline.read_text(encoding="utf-8").splitlines()
    return [message for line in lines for message in json.loads(line)["messages"]]


@pytest.fixture(scope="module")
def tiktokens_own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiktoken.Encoding]:
    """Give the encodings as tiktoken builds them, from a cache that holds what it would have downloaded."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in NAMES:
        content = lzma.decompress((SHARED / "tiktoken" / f"{name}.tiktoken.xz").read_bytes())
        (cache / hashlib.sha1(URL.format(name).encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return {name: tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]()) for name in NAMES}


def published(message: dict[str, Any], theirs: tiktoken.Encoding) -> int:
    """Count a message by OpenAI's rule, and a call in it by its name and its arguments as LangChain sends them."""

    def of(text: str) -> int:
        return len(theirs.encode_ordinary(text))

    counted = 3 + of(message["role"]) + of(message["content"] or "")
    if message.get("name"):
        counted += 1 + of(message["name"])
    for each in message.get("tool_calls") or []:
        arguments = json.loads(each["function"]["arguments"])
        counted += 3 + of(each["function"]["name"]) + of(json.dumps(arguments, ensure_ascii=False))
    return counted


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_messages_count_what_the_published_rule_says(
    name: str, recorded: list[dict[str, Any]], tiktokens_own: dict[str, tiktoken.Encoding]
) -> None:
    expected = [published(message, tiktokens_own[name]) for message in recorded]
    counted = MessageCounter(MODELS[name]).counts(convert_to_messages(recorded))
    assert len(counted) == 2658
    assert counted == expected
    assert sum(bool(message.get("tool_calls")) for message in recorded) > 500
    assert sum("name" in message for message in recorded) > 500


# --- texts ------------------------------------------------------------------------------------------------------------
SCRIPTS = {
    "Latin": "Où est la gare? Größe, Łódź, İstanbul, ﬁne, ǅ; I'll've, DON'T",
    "Vietnamese": "Tôi muốn đặt vé máy bay đi Hà Nội",
    "Cyrillic": "Я хочу забронировать билет. Ђурђевак, ҐҒ",
    "Greek": "Θέλω ένα εισιτήριο, Ὀδυσσεύς",
    "Arabic": "أريد حجز تذكرة، من فضلك؟ ١٢٣٤٥",
    "Hebrew": "אני רוצה להזמין כרטיס, בְּבַקָּשָׁה",
    "Devanagari": "मैं टिकट बुक करना चाहता हूँ। १२३",
    "Bengali": "আমি টিকিট বুক করতে চাই",
    "Gurmukhi": "ਮੈਂ ਟਿਕਟ ਬੁੱਕ ਕਰਨਾ ਚਾਹੁੰਦਾ ਹਾਂ",
    "Gujarati": "હું ટિકિટ બુક કરવા માંગુ છું",
    "Tamil": "நான் டிக்கெட் முன்பதிவு செய்ய விரும்புகிறேன்",
    "Telugu": "నేను టికెట్ బుక్ చేయాలనుకుంటున్నాను",
    "Kannada": "ನಾನು ಟಿಕೆಟ್ ಕಾಯ್ದಿರಿಸಲು ಬಯಸುತ್ತೇನೆ",
    "Malayalam": "എനിക്ക് ടിക്കറ്റ് ബുക്ക് ചെയ്യണം",
    "Sinhala": "මට ටිකට් පතක් වෙන්කරවා ගැනීමට අවශ්‍යයි",
    "Thai": "ฉันต้องการจองตั๋วเครื่องบิน",
    "Lao": "ຂ້ອຍຕ້ອງການຈອງປີ້ຍົນ",
    "Khmer": "ខ្ញុំចង់កក់សំបុត្រយន្តហោះ",
    "Burmese": "လက်မှတ်ကြိုတင်မှာယူချင်ပါတယ်",
    "Tibetan": "ང་ལ་གནམ་གྲུའི་འཛིན་བྱང་ཞིག་དགོས།",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "Georgian": "მინდა ბილეთის დაჯავშნა, ᲗᲑᲘᲚᲘᲡᲘ",
    "Armenian": "Ես ուզում եմ տոմս ամրագրել",
    "Amharic": "ትኬት መያዝ እፈልጋለሁ።",
    "Cherokee": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ꮳꮃꭹ",
    "Han": "我想预订一张机票。謝謝。𠮷野家",
    "Hiragana": "ひこうきのよやくをしたいです。",
    "Katakana": "ﾋｺｳｷ、チケット・ヲ予約シタイ",
    "Hangul": "비행기 표를 예매하고 싶어요. 한글",
    "Gothic": "𐌲𐌿𐍄𐌹𐍃𐌺",
    "mathematical": "\U0001d518\U0001d52b\U0001d526 ∑∞≠ ½ Ⅻ ²",
}
ODDITIES = {
    "nothing": "",
    "a family": "👩‍👩‍👧‍👦👨🏿‍🚀",
    "flags": "🇦🇹🇯🇵🏴󠁧󠁢󠁳󠁣󠁴󠁿🏳️‍🌈",
    "keycaps": "1️⃣#️⃣*️⃣",
    "marks": "e\u0301" * 5 + "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!",
    "invisible": "\u200b\ufeff\u00ad\u2028\u2029\u202e\u00a0\u3000",
    "controls": "\x00\x01\x07\x1b[31m\x7f\x85",
    "no characters": "\ufffe\uffff\U0010ffff\ue000",
    "half a pair": "a\ud83d b",
    "the other half": "\ude00",
    "a pair in two": "\ud83d\ude00",
    "a pair the wrong way": "\ude00\ud83d",
    "many halves": "\ud800" * 50 + "text",
    "whitespace": " \t\r\n\r \n\n  x  ",
    "special": "<|endoftext|>",
    "special in text": "a<|endoftext|>b <|endofprompt|> <|fim_prefix|><|im_start|>system<|im_end|>",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", [*SCRIPTS, *ODDITIES])
def test_a_text_in_any_script_counts_what_tiktoken_says(what: str, name: str) -> None:
    text = {**SCRIPTS, **ODDITIES}[what]
    messages = [HumanMessage(text), AIMessage(text), HumanMessage([{"type": "text", "text": text}])]
    counter = MessageCounter(MODELS[name])
    assert counter.counts(messages) == [FRAME + ROLE + tokens(text, name)] * 3
    assert counter.count(HumanMessage("", name="Bob " + text)) == FRAME + ROLE + 1 + tokens("Bob " + text, name)


@given(text=st.text(st.characters(exclude_categories=()), max_size=100))
@example("\ud83d\ude00\ud83d")
def test_any_text_can_be_counted(text: str) -> None:
    for name in NAMES:
        assert MessageCounter(MODELS[name]).count(HumanMessage(text)) == FRAME + ROLE + tokens(text, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_looks_like_a_special_token_is_text(name: str) -> None:
    counter = MessageCounter(MODELS[name])
    for special in encoding(name).special_tokens_set:
        as_text = len(encoding(name).encode(special, disallowed_special=()))
        assert as_text > 1
        assert counter.count(HumanMessage(special)) == FRAME + ROLE + as_text
        assert counter.count(ChatMessage(content="", role=special)) == FRAME + as_text
        assert counter.count(call(special, {})) == FRAME + ROLE + 3 + as_text + tokens("{}", name)


PIECE = 50_000
"""Long texts are counted in pieces of so many characters; where words end the cut costs nothing, else a few tokens."""


def prose(length: int) -> str:
    chosen = random.Random(7)
    words = [
        "flight",
        "Reservation",
        "the",
        "a",
        "don't",
        "größe",
        "цена",
        "42",
        "seat,",
        "12B.",
        "\n",
        "I'LL",
        "(yes)",
    ]
    text = " ".join(chosen.choices(words, k=length // 4))
    assert len(text) >= length
    return text[:length]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [2 * PIECE, 2 * PIECE + 1, 5_000_000])
def test_a_long_text_of_words_counts_exactly_what_tiktoken_says(length: int, name: str) -> None:
    text = prose(length)
    assert MessageCounter(MODELS[name]).count(HumanMessage(text)) == FRAME + ROLE + tokens(text, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("run", "tokens_each"),
    [(" ", 1 / 128), ("\t ", 1.0), ("a", 1 / 8), ("\n \t", None), ("\u3000", None), ("1", 1 / 3), ("'s", None)],
    ids=["spaces", "tabs and spaces", "letters", "lines", "wide spaces", "digits", "contractions"],
)
def test_a_million_of_the_same_are_counted(run: str, tokens_each: float | None, name: str) -> None:
    """tiktoken as a whole gives up on some of these, so they are set against what a run of 12,800 says."""
    length = 1_000_000 // len(run)
    expected = (tokens(run * 12_800, name) / 12_800 if tokens_each is None else tokens_each) * length
    counted = MessageCounter(MODELS[name]).count(HumanMessage(run * length))
    assert abs(counted - expected) <= 4 * (1_000_000 / PIECE)


@pytest.mark.parametrize("name", NAMES)
def test_five_megabytes_of_base64_are_counted_within_a_few_tokens_a_piece(name: str) -> None:
    text = base64.b64encode(random.Random(7).randbytes(3_750_000)).decode()
    assert len(text) == 5_000_000
    counted = MessageCounter(MODELS[name]).count(HumanMessage(text))
    assert abs(counted - tokens(text, name)) <= 4 * (len(text) / PIECE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [SCRIPTS["Han"], SCRIPTS["Thai"], "0.25,", '{"id":17,"v":null},', "👩‍👩‍👧‍👦"])
def test_a_long_text_without_words_is_counted_within_a_few_tokens_a_piece(text: str, name: str) -> None:
    long = text * (500_000 // len(text))
    assert abs(count_text(long, encoding(name)) - tokens(long, name)) <= 4 * (len(long) / PIECE)


# --- the model --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [
        ("gpt-4o", "o200k_base"),
        ("gpt-4o-mini-2024-07-18", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("o1", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("openai/gpt-4o", "o200k_base"),
        ("openai:gpt-4o", "o200k_base"),
        ("openrouter:openai/gpt-4o", "o200k_base"),
        ("openai/gpt-4o:extended", "o200k_base"),
        ("ft:gpt-4o:org::id", "o200k_base"),
        ("ft:gpt-4o-mini-2024-07-18:org:name:id", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("openai:gpt-4-turbo", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("ft:gpt-3.5-turbo:org::id", "cl100k_base"),
        ("text-davinci-003", "o200k_base~estimate"),
        ("claude-sonnet-4-5", "o200k_base~estimate"),
        ("anthropic:claude-sonnet-4-5", "o200k_base~estimate"),
        ("anthropic.claude-3-5-sonnet-20240620-v1:0", "o200k_base~estimate"),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "o200k_base~estimate"),
        ("gemini-2.5-pro", "o200k_base~estimate"),
        ("models/gemini-2.5-flash", "o200k_base~estimate"),
        ("ollama/llama3:8b", "o200k_base~estimate"),
        ("some-model-of-tomorrow", "o200k_base~estimate"),
        ("not-gpt-4", "o200k_base~estimate"),
        ("gpt", "o200k_base~estimate"),
        ("", "o200k_base~estimate"),
        (":", "o200k_base~estimate"),
        ("a/", "o200k_base~estimate"),
    ],
)
def test_a_model_has_its_tokenizer_by_its_name(model: str, tokenizer: str) -> None:
    counter = MessageCounter(model)
    known = None if tokenizer.endswith("~estimate") else tokenizer
    assert (counter.tokenizer, encoding_name(model), counter.is_estimate) == (tokenizer, known, known is None)
    text = SCRIPTS["Tamil"]  # which the two encodings see differently
    assert counter.of_text(text) == tokens(text, tokenizer.removesuffix("~estimate"))
    assert tokens(text, "o200k_base") != tokens(text, "cl100k_base")


# --- how a message is framed ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("message", "role"),
    [
        (HumanMessage("Hi there"), "user"),
        (HumanMessageChunk(content="Hi there"), "user"),
        (SystemMessage("Hi there"), "system"),
        (AIMessage("Hi there"), "assistant"),
        (AIMessageChunk(content="Hi there"), "assistant"),
        (ToolMessage("Hi there", tool_call_id="call-1"), "tool"),
        (FunctionMessage(content="Hi there", name=""), "function"),
        (ChatMessage(content="Hi there", role="developer"), "developer"),
        (ChatMessageChunk(content="Hi there", role="a role of the app's own"), "a role of the app's own"),
        (ChatMessage(content="Hi there", role=""), ""),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseMessage) else str(each),
)
def test_a_message_counts_its_role_and_its_content(message: BaseMessage, role: str, counter: MessageCounter) -> None:
    assert counter.count(message) == FRAME + tokens(role) + tokens("Hi there")
    named = message.model_copy(update={"name": "Alice Müller"})
    assert counter.count(named) == FRAME + tokens(role) + tokens("Hi there") + 1 + tokens("Alice Müller")


def test_an_empty_message_counts_its_frame(counter: MessageCounter) -> None:
    empty = [HumanMessage(""), AIMessage(""), SystemMessage([]), HumanMessage(content="", name="")]
    assert counter.counts(empty) == [FRAME + ROLE] * 4
    assert counter.counts([]) == []


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"city": "São Paulo", "seats": 2},
        {"flights": [{"number": "HAT069", "prices": [1, 2.5, None, True]}, {}], "user": {"name": {"last": "李"}}},
        {"text": 'quotes " and \\ and \n lines'},
    ],
    ids=["none", "flat", "nested", "escaped"],
)
def test_a_call_of_a_tool_counts_its_name_and_its_arguments_as_langchain_sends_them(
    args: dict[str, Any], counter: MessageCounter
) -> None:
    one = 3 + tokens("book_flight") + tokens(json.dumps(args, ensure_ascii=False))
    assert counter.count(call("book_flight", args)) == FRAME + ROLE + one
    calls = [tool_call(name="book_flight", args=args, id=f"call-{number}") for number in range(3)]
    said = AIMessage("I book them.", tool_calls=calls)
    assert counter.count(said) == FRAME + ROLE + tokens("I book them.") + 3 * one


def test_arguments_that_are_no_json_count_as_python_writes_them(counter: MessageCounter) -> None:
    odd = {"places": {(48.2, 16.3): "Vienna"}, "when": {1}, "what": b"bytes"}
    assert counter.count(call("find", odd)) == FRAME + ROLE + 3 + tokens("find") + tokens(str(odd))


def test_a_call_with_broken_arguments_counts_the_text_of_them(counter: MessageCounter) -> None:
    broken = invalid_tool_call(name="book", args='{"city": "Vien', id="call-1", error="cut")
    expected = FRAME + ROLE + 3 + tokens("book") + tokens('{"city": "Vien')
    assert counter.count(AIMessage("", invalid_tool_calls=[broken])) == expected
    empty = invalid_tool_call(name=None, args=None, id=None, error=None)
    assert counter.count(AIMessage("", invalid_tool_calls=[empty])) == FRAME + ROLE + 3 + tokens("{}")
    good = tool_call(name="book", args={"city": "Vienna"}, id="call-2")
    both = AIMessage("", tool_calls=[good], invalid_tool_calls=[broken])
    assert counter.count(both) == expected + 3 + tokens("book") + tokens('{"city": "Vienna"}')


def test_a_call_from_before_there_were_tools_is_counted_once(counter: MessageCounter) -> None:
    function = {"name": "book", "arguments": '{"city": "Vienna"}'}
    of_call = 3 + tokens("book") + tokens('{"city": "Vienna"}')
    old = AIMessage("", additional_kwargs={"function_call": function})
    assert counter.count(old) == FRAME + ROLE + of_call
    both = AIMessage(
        "",
        additional_kwargs={"function_call": function},
        tool_calls=[tool_call(name="book", args={"city": "Vienna"}, id="call-1")],
    )
    assert counter.count(both) == FRAME + ROLE + of_call
    assert counter.count(AIMessage("", additional_kwargs={"function_call": "rubbish"})) == FRAME + ROLE


# --- blocks of content ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "block",
    [
        "Two tickets",
        {"type": "text", "text": "Two tickets"},
        {"type": "text", "text": "Two tickets", "cache_control": {"type": "ephemeral"}, "index": 0, "id": "b1"},
        {"type": "text", "text": "Two tickets", "annotations": [{"type": "citation", "url": "https://a.example"}]},
        {"type": "input_text", "text": "Two tickets"},
        {"type": "output_text", "text": "Two tickets", "logprobs": []},
        {"text": "Two tickets"},
    ],
    ids=["string", "plain", "cached", "annotated", "input", "output", "without a type"],
)
def test_a_block_of_text_counts_its_text(block: Any) -> None:
    assert of_content([block]) == tokens("Two tickets")
    assert of_content([block, block]) == 2 * tokens("Two tickets")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\x00" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    app0 = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    frame = b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\x00"
    return b"\xff\xd8" + app0 + frame + b"\xff\xd9"


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x00\x00\x00;"


def webp(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x00\x00\x00\x00" + sizes
    return b"RIFF" + struct.pack("<I", len(body)) + body


def based(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{based(content)}"


def image_url(size: tuple[int, int], detail: str | None = None) -> dict[str, Any]:
    given = {"url": data_url(png(*size))}
    return {"type": "image_url", "image_url": given if detail is None else {**given, "detail": detail}}


@pytest.mark.parametrize("make", [png, jpeg, gif, webp])
def test_the_size_of_an_image_is_read_from_its_own_header(make: Callable[[int, int], bytes]) -> None:
    assert read_image({"type": "image", "base64": based(make(2000, 300))}) == ((2000, 300), "auto")


IMAGE_FORMS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "chat": lambda raw: {"type": "image_url", "image_url": {"url": data_url(raw), "detail": "high"}},
    "chat, short": lambda raw: {"type": "image_url", "image_url": data_url(raw), "detail": "high"},
    "responses": lambda raw: {"type": "input_image", "image_url": data_url(raw), "detail": "high"},
    "LangChain 1": lambda raw: {"type": "image", "base64": based(raw), "mime_type": "image/png", "detail": "high"},
    "LangChain 1, URL": lambda raw: {"type": "image", "url": data_url(raw), "detail": "high"},
    "LangChain 0.3": lambda raw: {"type": "image", "source_type": "base64", "data": based(raw), "detail": "high"},
    "bytes": lambda raw: {"type": "image", "data": raw, "detail": "high"},
    "Anthropic": lambda raw: {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": based(raw)},
        "detail": "high",
    },
    "Anthropic, URL": lambda raw: {"type": "image", "source": {"type": "url", "url": data_url(raw)}, "detail": "high"},
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_an_image_is_read_in_every_form(form: str) -> None:
    block = IMAGE_FORMS[form](png(2048, 4096))
    assert read_image(block) == ((2048, 4096), "high")
    assert of_content([{"type": "text", "text": "What is it?"}, block]) == tokens("What is it?") + 1105


@pytest.mark.parametrize(
    ("model", "size", "detail", "expected"),
    [
        # https://platform.openai.com/docs/guides/images-vision#calculating-costs
        ("gpt-4o", (1024, 1024), "high", 765),
        ("gpt-4o", (2048, 4096), "high", 1105),
        ("gpt-4o", (4096, 8192), "low", 85),
        ("gpt-4o", (1024, 1024), "auto", 765),
        ("gpt-4o", (1024, 1024), None, 765),
        ("gpt-4o", (1, 1), "high", 85 + 170),
        ("gpt-4o", (512, 512), "high", 85 + 170),
        ("gpt-4o", (513, 512), "high", 85 + 2 * 170),
        ("gpt-4o", (768, 2048), "high", 85 + 8 * 170),
        ("gpt-4o", (1, 100_000_000), "high", 85 + 4 * 170),
        ("openai/gpt-4o", (1024, 1024), "high", 765),
        ("claude-sonnet-4-5", (1024, 1024), "high", 765),
        ("gpt-4o-mini", (1024, 1024), "high", 2833 + 4 * 5667),
        ("gpt-4o-mini-2024-07-18", (1024, 1024), "low", 2833),
        ("openai/gpt-4o-mini:extended", (1024, 1024), "low", 2833),
        ("ft:gpt-4o-mini-2024-07-18:org::id", (1024, 1024), "low", 2833),
        ("o1", (1024, 1024), "high", 75 + 4 * 150),
        ("openai:o1", (1024, 1024), "low", 75),
        ("o3", (1024, 1024), "high", 75 + 4 * 150),
        ("gpt-5", (1024, 1024), "high", 70 + 4 * 140),
        ("gpt-4.1", (1024, 1024), "high", 765),
        ("gpt-4.1-mini", (1024, 1024), "high", math.ceil(1024 * 1.62)),
        ("gpt-4.1-mini", (1800, 2400), "high", math.ceil(1452 * 1.62)),
        ("gpt-4.1-mini", (32, 33), "high", math.ceil(2 * 1.62)),
        ("gpt-4.1-nano", (1024, 1024), "high", math.ceil(1024 * 2.46)),
        ("gpt-5-mini", (1024, 1024), "high", math.ceil(1024 * 1.62)),
        ("o4-mini", (1024, 1024), "high", math.ceil(1024 * 1.72)),
    ],
)
def test_an_image_counts_what_the_published_rule_says(
    model: str, size: tuple[int, int], detail: str | None, expected: int
) -> None:
    assert of_content([image_url(size, detail)], model) == expected


SIZES = st.integers(1, 20_000)


def ceiling(value: Decimal) -> int:
    return math.ceil(value - Decimal("1e-30"))  # what 50 digits are off by


@given(width=SIZES, height=SIZES)
@example(1800, 2400)
@example(2795, 4382)  # 31 patches across, and as a float a little over 31
@example(4728, 788)  # 96 by 16 patches, and as a float a little under 96
@example(320, 480)  # 150 patches of 1.62 are 243 tokens, and as a float a little over 243
@example(1, 20_000)
def test_an_image_in_patches_is_exact_for_every_size(width: int, height: int) -> None:
    with localcontext(prec=50):
        wide, high = Decimal(width) / 32, Decimal(height) / 32
        patches = math.ceil(wide) * math.ceil(high)
        if patches > 1536:
            shrink = (1536 / (wide * high)).sqrt()
            wide, high = wide * shrink, high * shrink
            if min(wide, high) >= 1:
                whole = min(math.floor(side + Decimal("1e-30")) / side for side in (wide, high))
                wide, high = wide * whole, high * whole
            patches = min(1536, ceiling(wide) * ceiling(high))
        assert image_tokens("gpt-4.1-mini", (width, height)) == ceiling(patches * Decimal("1.62"))


@given(width=SIZES, height=SIZES)
@example(20_000, 1)
def test_an_image_in_tiles_is_exact_for_every_size(width: int, height: int) -> None:
    shrink = min(Fraction(1), Fraction(2048, max(width, height)))
    shrink *= min(Fraction(1), 768 / (min(width, height) * shrink))
    tiles = math.ceil(width * shrink / 512) * math.ceil(height * shrink / 512)
    assert image_tokens("gpt-4o", (width, height)) == 85 + 170 * tiles


BROKEN_IMAGES: dict[str, dict[str, Any]] = {
    "a URL": {"type": "image_url", "image_url": {"url": "https://a.example/a.png"}},
    "an Anthropic URL": {"type": "image", "source": {"type": "url", "url": "https://a.example/a.png"}},
    "a file": {"type": "image", "file_id": "file-1"},
    "no base64": {"type": "image", "base64": "?" * 33},
    "cut base64": {"type": "image", "base64": based(png(2, 2))[:11]},
    "no image": {"type": "image", "base64": based(b"This is no image at all.")},
    "a header alone": {"type": "image", "base64": based(png(2, 2)[:12])},
    "no size": {"type": "image", "base64": based(png(0, 0))},
    "a vector": {"type": "image", "base64": based(b"<svg width='100%' height='5em'></svg>")},
    "an empty URL": {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
    "half a URL": {"type": "image_url", "image_url": {"url": "data:"}},
    "nothing": {"type": "image"},
    "none": {"type": "image_url", "image_url": None},
    "a number": {"type": "image", "data": 10**12},
    "rubbish": {"type": "image_url", "image_url": {"url": 5, "detail": 7}},
}


@pytest.mark.parametrize("what", BROKEN_IMAGES)
def test_an_image_of_unknown_size_is_assumed_to_be_of_1024_pixels(what: str) -> None:
    block = BROKEN_IMAGES[what]
    assert read_image(block) == (UNKNOWN_SIZE, "auto")
    assert of_content([block]) == 765
    assert of_content([block], "gpt-4o-mini") == 2833 + 4 * 5667


def test_an_image_behind_a_url_in_low_detail_is_the_base_alone() -> None:
    url = {"url": "https://a.example/a.png", "detail": "low"}
    assert of_content([{"type": "image_url", "image_url": url}]) == 85


MEGABYTE = based(random.Random(7).randbytes(750_000))
DATA_BLOCKS: dict[str, Any] = {
    "audio, OpenAI": {"type": "input_audio", "input_audio": {"data": MEGABYTE, "format": "wav"}},
    "audio, LangChain": {"type": "audio", "base64": MEGABYTE, "mime_type": "audio/wav"},
    "file, OpenAI": {
        "type": "file",
        "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{MEGABYTE}"},
    },
    "file, LangChain": {"type": "file", "source_type": "base64", "data": MEGABYTE, "mime_type": "application/pdf"},
    "document, Anthropic": {"type": "document", "source": {"type": "base64", "data": MEGABYTE}},
    "image, Bedrock": {"image": {"format": "png", "source": {"bytes": b"\x89PNG" * 100_000}}},
    "media, Google": {"type": "media", "mime_type": "video/mp4", "data": bytearray(100_000)},
    "signed thinking": {"type": "thinking", "thinking": "Hm.", "signature": MEGABYTE},
    "lines of base64": {"type": "file", "base64": "\n".join([MEGABYTE[:76]] * 1000)},
    "in a list": {"type": "frames", "frames": (MEGABYTE,)},
}


@pytest.mark.parametrize("what", DATA_BLOCKS)
def test_data_in_a_block_is_not_read_as_text(what: str) -> None:
    counted = of_content([DATA_BLOCKS[what]])
    assert 85 < counted < 85 + 50
    assert of_content([DATA_BLOCKS[what]] * 2) == 2 * counted


@pytest.mark.parametrize(
    "text", ["I think about it. " * 100, "我想了想。" * 200, "ฉันคิดว่า" * 100], ids=["en", "zh", "th"]
)
def test_what_a_model_thought_counts_as_text_in_any_script(text: str) -> None:
    block = {"type": "reasoning", "reasoning": text}
    assert of_content([block]) == tokens(json.dumps(block, ensure_ascii=False))
    assert of_content([block]) > tokens(text)


@pytest.mark.parametrize("kind", ["tool_use", "tool_call", "function_call", "input_json_delta"])
def test_a_call_in_the_content_and_in_tool_calls_counts_once(kind: str, counter: MessageCounter) -> None:
    blocks: list[Any] = [
        {"type": "text", "text": "I look."},
        {"type": kind, "id": "c", "name": "f", "input": {"q": "x"}},
    ]
    calls = [tool_call(name="f", args={"q": "x"}, id="c")]
    twice = AIMessage(blocks, tool_calls=calls)
    assert counter.count(twice) == counter.count(AIMessage("I look.", tool_calls=calls))
    assert counter.count(AIMessage(blocks)) > counter.count(AIMessage("I look."))
    answer = [*blocks, {"type": "server_tool_use", "name": "web_search", "input": {"query": "fares"}}]
    assert counter.count(AIMessage(answer, tool_calls=calls)) > counter.count(twice)


RUBBISH: list[Any] = [
    {},
    {"type": None},
    {"type": 5},
    {"type": ["text"]},
    {"type": "text"},
    {"type": "text", "text": None},
    {"type": "text", "text": {"value": "nested"}},
    {"type": "of tomorrow", "what": [{"a": None}, 1.5, float("nan"), {1, 2}, object()]},
    {"type": "keys", "of": {(1, 2): "a pair", None: "none", 5: "five"}},
    [["a", "list"]],
    5,
    None,
    b"bytes",
]


@pytest.mark.parametrize("block", RUBBISH, ids=lambda block: str(block)[:30])
def test_a_block_of_no_known_form_is_counted_as_what_it_holds(block: Any, counter: MessageCounter) -> None:
    message = HumanMessage.model_construct(content=[block], type="human")
    assert FRAME + ROLE < counter.count(message) < FRAME + ROLE + 120
    assert counter.count(HumanMessage.model_construct(content=None, type="human")) == FRAME + ROLE


# --- tools ------------------------------------------------------------------------------------------------------------
INIT, PROPERTIES, PROPERTY, ENUM, ITEM, END = 7, 3, 3, -3, 3, 12
WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location.",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA."},
            "unit": {"type": "string", "description": "The unit of temperature", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location"],
    },
}


def of_weather(init: int = INIT, name: str = "o200k_base") -> int:
    """Count the tool of OpenAI's cookbook by the cookbook's rule, without its end."""
    counted = init + tokens("get_current_weather:Get the current weather in a given location", name)
    counted += PROPERTIES
    counted += PROPERTY + tokens("location:string:The city and state, e.g. San Francisco, CA", name)
    counted += PROPERTY + tokens("unit:string:The unit of temperature", name)
    return counted + ENUM + ITEM + tokens("celsius", name) + ITEM + tokens("fahrenheit", name)


WEATHER_FORMS: dict[str, dict[str, Any]] = {
    "OpenAI": {"type": "function", "function": WEATHER},
    "OpenAI, strict": {"type": "function", "function": {**WEATHER, "strict": True}},
    "OpenAI, bare": WEATHER,
    "OpenAI, Responses API": {"type": "function", **WEATHER},
    "Anthropic": {
        "name": WEATHER["name"],
        "description": WEATHER["description"],
        "input_schema": WEATHER["parameters"],
        "cache_control": {"type": "ephemeral"},
    },
    "Anthropic, custom": {
        "type": "custom",
        "name": WEATHER["name"],
        "description": WEATHER["description"],
        "input_schema": WEATHER["parameters"],
    },
    "Bedrock": {
        "toolSpec": {
            "name": WEATHER["name"],
            "description": WEATHER["description"],
            "inputSchema": {"json": WEATHER["parameters"]},
        }
    },
    "JSON schema": {
        "title": WEATHER["name"],
        "description": WEATHER["description"],
        "type": "object",
        "properties": WEATHER["parameters"]["properties"],  # type: ignore[index]
    },
}


@pytest.mark.parametrize("form", WEATHER_FORMS)
def test_a_tool_counts_what_the_published_rule_says_in_every_form(form: str, counter: MessageCounter) -> None:
    given = WEATHER_FORMS[form]
    assert counter.of_tools([given]) == of_weather() + END
    assert counter.of_tools([given, given]) == 2 * of_weather() + END
    assert MessageCounter("gpt-4").of_tools([given]) == of_weather(10, "cl100k_base") + END


def test_the_tools_are_part_of_what_a_tracker_counts() -> None:
    tracker = ContextTracker(model="gpt-4o")
    assert tracker.count(["Hi"]) == FRAME + ROLE + tokens("Hi") + 3
    assert tracker.count(["Hi"], tools=[WEATHER]) == tracker.count(["Hi"]) + of_weather() + END
    assert tracker.count([], tools=[]) == 3


def get_current_weather(location: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """Get the current weather in a given location."""
    return f"It is 20 {unit} in {location}."


weather = tool(get_current_weather)


class Seat(BaseModel):
    """A seat."""

    row: int = Field(description="From the front.")
    letter: str


class BookSeats(BaseModel):
    """Book seats on a flight."""

    seats: list[Seat] = Field(description="All of them.")
    first: Seat
    note: str | None = None


def test_a_tool_made_of_a_function_counts_by_its_schema(counter: MessageCounter) -> None:
    expected = INIT + tokens("get_current_weather:Get the current weather in a given location")
    expected += PROPERTIES + PROPERTY + tokens("location:string:") + PROPERTY + tokens("unit:string:")
    expected += ENUM + ITEM + tokens("celsius") + ITEM + tokens("fahrenheit")
    assert counter.of_tools([weather]) == expected + END
    assert counter.of_tools([get_current_weather]) == expected + END


def test_what_is_nested_in_a_tool_counts_by_the_same_rule(counter: MessageCounter) -> None:
    seat = PROPERTIES + PROPERTY + tokens("row:integer:From the front") + PROPERTY + tokens("letter:string:")
    expected = INIT + tokens("BookSeats:Book seats on a flight") + PROPERTIES
    expected += PROPERTY + seat + tokens("seats:array:All of them")
    expected += PROPERTY + seat + tokens("first:object:A seat")
    expected += PROPERTY + tokens("note:string|null:")
    assert counter.of_tools([BookSeats]) == expected + END


def test_a_schema_without_an_end_is_counted(counter: MessageCounter) -> None:
    node: dict[str, Any] = {"type": "object", "properties": {}}
    node["properties"]["child"] = node
    once = counter.of_tools([{"name": "walk", "parameters": {"type": "object", "properties": {"child": {}}}}])
    assert once < counter.of_tools([{"name": "walk", "parameters": node}]) < once + 8 * 20


@pytest.mark.parametrize(
    "native",
    [
        {"type": "web_search"},
        {"type": "file_search", "vector_store_ids": ["vs_1"]},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "mcp", "server_label": "wörter", "server_url": "https://a.example"},
        {"google_search": {}},
        {"function_declarations": [{"name": "f", "description": "天気"}]},
    ],
    ids=lambda native: str(native)[:30],
)
def test_a_tool_of_the_providers_own_counts_as_json(native: dict[str, Any], counter: MessageCounter) -> None:
    assert counter.of_tools([native]) == INIT + tokens(json.dumps(native, ensure_ascii=False)) + END


def test_a_tool_that_is_no_json_counts_as_python_writes_it(counter: MessageCounter) -> None:
    circle: dict[str, Any] = {"type": "circle"}
    circle["itself"] = [circle]
    assert counter.of_tools([circle]) == INIT + tokens(str(circle)) + END


@pytest.mark.parametrize(
    ("schema", "same"),
    [
        ({"name": "ping", "description": None}, {"name": "ping"}),
        ({"name": "ping", "parameters": None}, {"name": "ping"}),
        ({"name": "ping", "parameters": {"type": "object", "properties": {}}}, {"name": "ping"}),
        ({"type": "function", "name": "ping"}, {"name": "ping"}),
        (
            {"name": "ping", "parameters": {"properties": {"a": "rubbish"}}},
            {"name": "ping", "parameters": {"properties": {"a": {}}}},
        ),
    ],
)
def test_a_schema_that_leaves_things_out_is_counted(schema: Any, same: Any, counter: MessageCounter) -> None:
    assert abs(counter.of_tools([schema]) - counter.of_tools([same])) <= 1


def unreadable(what: Callable[[int], int]) -> None:
    """Take what no JSON schema can describe."""


@pytest.mark.parametrize("odd", [5, None, "get_current_weather", {}, object(), ["a"], unreadable], ids=named)
def test_what_is_no_tool_is_refused_with_what_to_pass(odd: Any, counter: MessageCounter) -> None:
    with pytest.raises(ContextError, match=rf"it is a {type(odd).__name__}\. .* bind_tools .* Pass tools=\[my_tool\]"):
        counter.of_tools([weather, odd])


@pytest.mark.parametrize("odd", [5, get_current_weather, "search", {"type": "web_search"}, weather])
def test_one_tool_in_place_of_a_list_is_refused_with_what_to_pass(odd: Any, counter: MessageCounter) -> None:
    with pytest.raises(ContextError, match=r"tools=\[my_tool\]"):
        counter.of_tools(odd)


def test_tools_in_any_sequence_count_the_same(counter: MessageCounter) -> None:
    fresh = MessageCounter("gpt-4o")
    assert fresh.of_tools(each for each in [WEATHER, weather]) > 0
    assert fresh.of_tools(each for each in [WEATHER]) == counter.of_tools((WEATHER,)) == of_weather() + END
    assert counter.of_tools([]) == 0


def test_other_tools_in_the_same_place_are_counted_anew(counter: MessageCounter) -> None:
    """Tools made for each request lie where earlier ones lay; the earliest are forgotten."""
    for number in range(300):
        made = {"name": f"tool{'_x' * (number % 7)}", "parameters": {"properties": {}}}
        expected = INIT + tokens(made["name"] + ":") + END  # type: ignore[operator]
        assert counter.of_tools([made]) == expected
        del made
        gc.collect(0)


# --- what is remembered -----------------------------------------------------------------------------------------------
class Asked:
    """A counter of the app's that keeps what it was asked."""

    def __init__(self) -> None:
        self.messages: list[BaseMessage] = []

    def __call__(self, messages: Sequence[BaseMessage]) -> int:
        self.messages += messages
        return 10 + len(str(messages[0].content))


def test_a_message_is_counted_once() -> None:
    asked = Asked()
    counter = MessageCounter("gpt-4o", asked)
    history: list[BaseMessage] = [
        SystemMessage("You book flights.", id="m1"),
        HumanMessage("Hi", id="m2"),
        AIMessage("", id="m3", tool_calls=[tool_call(name="f", args={"q": 1}, id="c")]),
        ToolMessage("ok", id="m4", tool_call_id="c"),
        AIMessage("", id="m5", tool_calls=[tool_call(name="f", args={"q": [1, {"a": 2}]}, id="d")]),
        AIMessage("Done", id="m6"),
    ]
    counts = counter.counts(history)
    assert asked.messages == history
    with_image = [*history, HumanMessage([{"type": "text", "text": "This one"}, image_url((8, 8))], id="m7")]
    for _ in range(3):
        assert counter.counts(with_image)[:6] == counts
        assert counter.counts([each.model_copy(deep=True) for each in history]) == counts
        assert [counter.count(message) for message in history] == counts
    assert asked.messages == with_image
    assert counter.remembered == len(with_image)


def long_history(length: int = 120) -> list[BaseMessage]:
    """Return messages of all kinds, in a list that is long enough to be held."""
    history: list[BaseMessage] = []
    for number in range(length // 4):
        call = tool_call(name="look_up", args={"item": f"tea {number}"}, id=f"call-{number}")
        history += [
            HumanMessage(f"What does tea {number} cost?", id=f"u-{number}"),
            AIMessage("", tool_calls=[call], id=f"a-{number}"),
            ToolMessage(f"{number} euros", tool_call_id=f"call-{number}", id=f"t-{number}"),
            AIMessage(f"It costs {number} euros.", id=f"b-{number}"),
        ]
    return history


def test_the_same_objects_are_counted_by_what_they_say_now() -> None:
    """A list that is held as it is must not hide what was changed in it."""
    counter, history = MessageCounter("gpt-4o"), long_history()

    def expected() -> list[int]:
        return MessageCounter("gpt-4o").counts(history)

    assert counter.counts(history) == counter.counts(history) == expected()
    history[0].content = "Something else, and more of it."
    assert counter.counts(history) == expected()
    changed: Any = history[1]
    changed.tool_calls[0]["args"]["item"] = "a great deal of tea, of several kinds"
    assert counter.counts(history) == expected()
    history += [HumanMessage("And coffee?", id="more"), AIMessage("No coffee.", id="none")]
    assert counter.counts(history) == counter.counts(history) == expected()
    changed.tool_calls[0]["args"]["item"] = "tea"
    assert counter.counts(history) == expected()
    history[3] = AIMessage("A message in the place of another one.", id="b-0")
    assert counter.counts(history) == expected()
    del history[5]
    assert counter.counts(history) == expected()
    assert counter.counts(history[1:]) == expected()[1:]


def set_first_call(**changed: Any) -> Callable[[AIMessage], None]:
    return lambda message: message.tool_calls[0].update(changed)  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "change",
    [
        set_first_call(name="look_up_in_the_long_list_of_all_teas"),
        set_first_call(args={"item": 1}),
        set_first_call(args={"item": True}),
        set_first_call(args={"item": ["several", "kinds", "of", "tea"]}),
        lambda message: message.tool_calls[0]["args"].update({"another": "argument"}),
        lambda message: message.tool_calls.append(tool_call(name="and_another", args={}, id="more")),
        lambda message: message.tool_calls.clear(),
        lambda message: message.additional_kwargs.update({"function_call": {"name": "old", "arguments": "{}"}}),
        lambda message: message.invalid_tool_calls.append(
            invalid_tool_call(name="broken", args="{", id="x", error="no JSON")
        ),
    ],
)
@pytest.mark.parametrize("known", [{}, {"refusal": None}, {"function_call": {"name": "older", "arguments": "{}"}}])
@pytest.mark.parametrize("first", ["tea", 1, True])
def test_calls_that_are_changed_in_place_are_counted_as_they_are(
    change: Callable[[AIMessage], None], known: dict[str, Any], first: Any
) -> None:
    counter, history = MessageCounter("gpt-4o"), long_history()
    call = tool_call(name="look_up", args={"item": first}, id="call")
    message = AIMessage("", tool_calls=[call], additional_kwargs={**known}, id="a")
    history[1] = message
    assert counter.counts(history) == counter.counts(history)
    change(message)
    assert counter.counts(history) == MessageCounter("gpt-4o").counts(history)
    message.tool_calls.clear()
    assert counter.counts(history) == MessageCounter("gpt-4o").counts(history)


def test_blocks_that_are_changed_in_place_are_counted_as_they_are() -> None:
    counter, history = MessageCounter("gpt-4o"), long_history()
    block: dict[str, Any] = {"type": "text", "text": "Short"}
    history.append(HumanMessage([block], id="blocks"))
    before = counter.counts(history)[-1]
    assert counter.counts(history)[-1] == before
    history[-1].content[0]["text"] = "Not so short any more, as it has more words"  # type: ignore[index]
    assert counter.counts(history)[-1] > before + 5


def test_histories_that_are_held_are_few_and_not_the_huge_ones() -> None:
    counter = MessageCounter("gpt-4o")
    histories = [long_history() for _ in range(20)]
    for history in histories:
        counter.counts(history)
    held = [weakref.ref(history[0]) for history in histories]
    huge = [HumanMessage("word " * 6_000, id=f"h-{number}") for number in range(100)]
    counter.counts(huge)
    last = weakref.ref(huge[0])
    del histories, history, huge
    gc.collect()
    assert sum(each() is not None for each in held) == 8
    assert last() is None


def test_equal_messages_without_ids_are_counted_once() -> None:
    asked = Asked()
    assert (
        MessageCounter("gpt-4o", asked).counts([HumanMessage("Hi"), HumanMessage("Hi"), HumanMessage("Ho")]) == [12] * 3
    )
    assert len(asked.messages) == 2


def changes() -> Iterator[tuple[BaseMessage, BaseMessage]]:
    """Give pairs of messages with one id that do not count the same."""
    yield HumanMessage("Hi"), HumanMessage("Hi, how much is it?")
    yield HumanMessage("Hi"), SystemMessage([{"type": "text", "text": "Hi, how much is it?"}])
    yield HumanMessage("Hi"), HumanMessage("Hi", name="Alice")
    yield HumanMessage("Hi", name="Al"), HumanMessage("Hi", name="Alice from Vienna")
    yield ChatMessage(content="Hi", role="critic"), ChatMessage(content="Hi", role="a critic of the critic")
    yield (
        HumanMessage([{"type": "text", "text": "Hi"}]),
        HumanMessage([{"type": "text", "text": "Hi, how much is it?"}]),
    )
    yield HumanMessage([image_url((8, 8), "high")]), HumanMessage([image_url((8, 8), "low")])
    yield HumanMessage([image_url((8, 8))]), HumanMessage([image_url((1024, 1024))])
    yield HumanMessage([{"type": "x", "x": {}}]), HumanMessage([{"type": "x", "x": {"deep": ["down"]}}])
    yield AIMessage(""), call("search", {"q": "fares"})
    yield call("search", {"q": "fares"}), call("search", {"q": "fares to Vienna"})
    yield call("search", {"q": "fares"}), call("search_again", {"q": "fares"})
    yield call("search", {"q": "fares"}), call("search", {"the query": "fares"})
    yield call("search", {"q": 1}), call("search", {"q": 1.0})
    yield call("search", {"q": 1}), call("search", {"q": True})
    yield call("search", {"q": 0}), call("search", {"q": ""})
    yield call("search", {"q": [1]}), call("search", {"q": [1.0]})
    yield call("search", {"q": {"a": [1]}}), call("search", {"q": {"a": [1, 2]}})
    one = call("search", {"q": "fares"})
    two = AIMessage("", tool_calls=[*one.tool_calls, tool_call(name="search", args={"q": "fares"}, id="call-2")])
    yield one, two
    for args in ('{"q', '{"query'):
        broken = invalid_tool_call(name="search", args=args, id="call-1", error=None)
        yield AIMessage(""), AIMessage("", invalid_tool_calls=[broken])
        yield one, AIMessage("", invalid_tool_calls=[broken])
        old = {"function_call": {"name": "search", "arguments": args}}
        yield AIMessage(""), AIMessage("", additional_kwargs=old)


@pytest.mark.parametrize(("one", "other"), list(changes()))
@pytest.mark.parametrize("message_id", ["m1", None])
def test_a_changed_message_is_counted_anew(message_id: str | None, one: BaseMessage, other: BaseMessage) -> None:
    one, other = (each.model_copy(update={"id": message_id}) for each in (one, other))
    of_one, of_other = (MessageCounter("gpt-4o").count(each) for each in (one, other))
    assert of_one != of_other
    for first, second, expected in ((one, other, [of_one, of_other]), (other, one, [of_other, of_one])):
        counter = MessageCounter("gpt-4o")
        for _ in range(2):
            assert [counter.count(first), counter.count(second)] == expected
            assert counter.counts([first, second]) == expected


def test_a_message_that_is_changed_in_place_is_counted_anew(counter: MessageCounter) -> None:
    block = {"type": "text", "text": "Hi"}
    message = HumanMessage([block], id="m1")
    counter.count(message)
    block["text"] = "Hi, how much is it?"
    message.content = [block]
    assert counter.count(message) == FRAME + ROLE + tokens(block["text"])
    asking = call("search", {"q": {"to": ["Vienna"]}})
    counter.count(asking)
    asking.tool_calls[0]["args"]["q"]["to"].append("Graz, by the way")
    assert counter.count(asking) == MessageCounter("gpt-4o").count(asking)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.floats(0, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
shared_by_all = MessageCounter("gpt-4o")


@given(args=st.dictionaries(st.text(max_size=3), JSON, max_size=3), name=st.sampled_from(["f", "find"]))
def test_no_two_calls_are_taken_for_one_another(args: dict[str, Any], name: str) -> None:
    expected = FRAME + ROLE + 3 + tokens(name) + tokens(json.dumps(args, ensure_ascii=False))
    assert shared_by_all.count(call(name, args)) == expected


@given(block=st.dictionaries(st.sampled_from(["type", "text", "source", "x"]), JSON, max_size=3))
def test_no_two_blocks_are_taken_for_one_another(block: dict[str, Any]) -> None:
    message = HumanMessage([block], id="m1")
    assert shared_by_all.count(message) == MessageCounter("gpt-4o").count(message)


def test_what_is_remembered_is_bounded() -> None:
    """The newest 21,000 messages at least, and 42,000 at most."""
    asked: list[int] = []

    def one(messages: Sequence[BaseMessage]) -> int:
        asked.append(1)
        return 1

    counter = MessageCounter("gpt-4o", one)
    for start in range(0, 210_000, 10_000):
        counter.counts([HumanMessage(str(number)) for number in range(start, start + 10_000)])
        assert counter.remembered <= 42_000
    assert len(asked) == 210_000
    assert 21_000 < counter.remembered <= 42_000
    counter.counts([HumanMessage(str(number)) for number in range(210_000 - 21_000, 210_000)])
    assert len(asked) == 210_000
    counter.counts([HumanMessage(str(number)) for number in range(100)])
    assert len(asked) == 210_100
    assert counter.remembered <= 42_000


def test_threads_that_count_the_same_history_agree() -> None:
    chosen = random.Random(7)
    history: list[BaseMessage] = []
    for number in range(400):
        history += [
            HumanMessage(SCRIPTS[chosen.choice(list(SCRIPTS))] * chosen.randint(1, 20), id=f"h{number}"),
            AIMessage("", id=f"c{number}", tool_calls=[tool_call(name="f", args={"q": [number]}, id="c")]),
            HumanMessage([{"type": "text", "text": f"No. {number}"}, image_url((number + 1, 600))], id=f"i{number}"),
            AIMessage(f"Answer {number}", id=f"a{number}"),
        ]
    expected = MessageCounter("gpt-4o").counts(history)
    counter = MessageCounter("gpt-4o")
    start = threading.Barrier(8)
    found: list[list[int]] = []

    def work(seed: int) -> None:
        places = list(range(len(history)))
        random.Random(seed).shuffle(places)
        start.wait()
        shuffled = counter.counts([history[place] for place in places])
        found.append([tokens for _, tokens in sorted(zip(places, shuffled, strict=True))])
        found.append(counter.counts(history))
        of_tools.append(counter.of_tools([WEATHER, weather]))

    of_tools: list[int] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 16
    assert of_tools == [MessageCounter("gpt-4o").of_tools([WEATHER, weather])] * 8
    assert counter.remembered == len(history)


# --- a counter of the app's -------------------------------------------------------------------------------------------
def test_a_counter_of_the_apps_counts_in_place_of_tiktoken() -> None:
    counter = MessageCounter("gpt-4o", Asked())
    assert (counter.tokenizer, counter.is_estimate) == ("custom", False)
    assert counter.counts([HumanMessage("Hello"), AIMessage("")]) == [15, 10]
    tracker = ContextTracker(model="some-model", limit=1000, counter=Asked())
    assert tracker.tokenizer == "custom"
    assert tracker.count([("user", "Hello")]) == 15 + 3
    assert MessageCounter("gpt-4o", lambda messages: 0).count(HumanMessage("Hello")) == 0


class Unable:
    """A counter that fails as it is told to."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def __call__(self, messages: Sequence[BaseMessage]) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


UNABLE = [LookupError("no model"), None, -1, 1.5, True, "12", [12], float("nan")]


@pytest.mark.parametrize("said", UNABLE, ids=named)
def test_tiktoken_counts_where_a_counter_of_the_apps_fails(
    said: Any, lenient: None, caplog: pytest.LogCaptureFixture
) -> None:
    history = [HumanMessage("Hello"), call("search", {"q": "fares"}), HumanMessage([image_url((8, 8))])]
    counter = MessageCounter("gpt-4o", Unable(said))
    with caplog.at_level(logging.WARNING, "turntrace"):
        counted = counter.counts(history)
        assert counter.counts([*history, AIMessage("Hi")])[:3] == counted
    assert counted == MessageCounter("gpt-4o").counts(history)
    (warning,) = caplog.records
    assert "counting tokens by counter=... failed" in warning.getMessage()
    if not isinstance(said, Exception):
        assert f"returned {said!r}. Allowed is an int of 0 or more" in warning.getMessage()


@pytest.mark.parametrize("said", UNABLE, ids=named)
def test_our_own_tests_see_a_counter_that_fails(said: Any) -> None:
    with pytest.raises(type(said) if isinstance(said, Exception) else ContextError):
        MessageCounter("gpt-4o", Unable(said)).count(HumanMessage("Hello"))


@pytest.mark.parametrize("odd", [5, "len", ["a"], object()], ids=lambda odd: type(odd).__name__)
def test_a_counter_that_cannot_be_called_is_refused(odd: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"counter is a {type(odd).__name__}, which cannot be called\. Pass a"
    ):
        MessageCounter("gpt-4o", odd)


# --- what providers say -----------------------------------------------------------------------------------------------
def test_the_counts_of_an_estimate_follow_what_the_provider_says() -> None:
    tracker = ContextTracker(model="some-model", limit=1000)
    history = ["Hello there", ("assistant", "Hi")]
    counted = tracker.count(history)
    tracker.calibrate(counted, 2 * counted)
    assert tracker.count(history) == 2 * counted
    tracker.calibrate(tracker.count(history), 3 * counted)  # a fifth of the way from 2 to 3
    assert calibration.factor_of("some-model") == pytest.approx(2.2)
    assert tracker.count(history) == math.ceil(2.2 * counted)
    assert ContextTracker(model="some-model", limit=5).count(history) == tracker.count(history)
    assert ContextTracker(model="other-model", limit=5).count(history) == counted
    for _ in range(60):
        tracker.calibrate(tracker.count(history), counted)
    assert tracker.count(history) == pytest.approx(counted, abs=1)


@pytest.mark.parametrize(("provided", "factor"), [(10**9, 4.0), (1, 0.25), (300, 3.0)])
def test_a_factor_stays_between_a_quarter_and_four(provided: int, factor: float) -> None:
    calibration.learn("some-model", 100, provided)
    assert calibration.factor_of("some-model") == factor
    for _ in range(10):
        calibration.learn("some-model", 100, provided)
    assert calibration.factor_of("some-model") == pytest.approx(factor)


def test_a_count_of_nothing_says_nothing() -> None:
    for counted, provided in ((0, 100), (100, 0), (-1, 100), (100, -1)):
        calibration.learn("some-model", counted, provided)
    assert calibration.factor_of("some-model") == 1.0


@pytest.mark.parametrize("options", [{"model": "gpt-4o"}, {"model": "some-model", "limit": 99, "counter": Asked()}])
def test_the_counts_of_what_is_no_estimate_are_not_corrected(options: dict[str, Any]) -> None:
    tracker = ContextTracker(**options)
    counted = tracker.count(["Hello"])
    tracker.calibrate(counted, 3 * counted)
    assert calibration.factor_of(options["model"]) == 1.0
    calibration.learn(options["model"], 1, 3)
    assert tracker.count(["Hello"]) == counted


@pytest.mark.parametrize(
    ("model", "window"),
    [
        ("gpt-4o", 128_000),
        ("gpt-4o-2024-08-06", 128_000),
        ("openai/gpt-4o", 128_000),
        ("openai:gpt-4o", 128_000),
        ("ft:gpt-4o:org::id", 128_000),
        ("openai/gpt-4o:extended", 128_000),
        ("claude-sonnet-4-5", 200_000),
        ("anthropic:claude-sonnet-4-5", 200_000),
        ("some-model-of-tomorrow", None),
        ("", None),
    ],
)
def test_a_model_has_its_window_by_its_name(model: str, window: int | None) -> None:
    assert window_of(model) == window
    assert window_of(model, "a vendor that is not on the list") == window


# --- messages in any form ---------------------------------------------------------------------------------------------
def test_messages_are_read_in_every_form() -> None:
    kept = AIMessage("Hi", id="m1")
    read = read_messages(
        (
            kept,
            "Hello",
            ("system", "Be kind"),
            ["assistant", "Hi"],
            {"role": "user", "content": "Hello", "name": "Alice"},
            {"role": "user", "content": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "ok", "tool_call_id": "c"},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind"}]},
            {"type": "human", "content": "Hello"},
        )
    )
    assert read[0] is kept
    assert [(message.type, message.content) for message in read[1:]] == [
        ("human", "Hello"),
        ("system", "Be kind"),
        ("ai", "Hi"),
        ("human", "Hello"),
        ("human", ""),
        ("ai", ""),
        ("tool", "ok"),
        ("system", [{"type": "text", "text": "Be kind"}]),
        ("human", "Hello"),
    ]
    assert read[4].name == "Alice"
    assert all(isinstance(tokens, int) for tokens in MessageCounter("gpt-4o").counts(read))
    assert read_messages([]) == []


def test_what_was_given_is_left_as_it_was() -> None:
    given: list[Any] = [{"role": "user", "content": "Hello"}, "Hi"]
    read_messages(given)
    assert given == [{"role": "user", "content": "Hello"}, "Hi"]


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        ({"role": "robot", "content": "Hi"}, "a mapping with the role 'robot'"),
        ({"role": "user"}, "a mapping with the role 'user'"),
        ({"role": "user", "content": 5}, "a mapping with the role 'user'"),
        ({"role": "tool", "content": "no id"}, "a mapping with the role 'tool'"),
        ({"content": "Hi"}, "a dict"),
        ({}, "a dict"),
        (("user", "Hi", "there"), "a tuple"),
        (("robot", "Hi"), "a tuple"),
        (5, "a int"),
        (None, "a NoneType"),
        (object(), "a object"),
    ],
    ids=named,
)
def test_a_message_of_no_known_form_is_named_by_its_position(odd: Any, what: str) -> None:
    with pytest.raises(
        ContextError, match=rf"Message 2 cannot be read: it is {what}\. Allowed are LangChain's messages"
    ):
        read_messages([HumanMessage("Hi"), ("user", "Hi"), odd])


@pytest.mark.parametrize(
    "odd",
    [HumanMessage("Hi"), "Hi", {"role": "user", "content": "Hi"}, None, 5, iter(["Hi"])],
    ids=lambda o: type(o).__name__,
)
def test_one_message_in_place_of_a_list_is_refused(odd: Any) -> None:
    with pytest.raises(
        ContextError, match=rf"messages is a {type(odd).__name__}\. Allowed is a list .* \[message\] for one"
    ):
        read_messages(odd)
    with pytest.raises(ContextError, match="Allowed is a list"):
        ContextTracker(model="gpt-4o").count(odd)
