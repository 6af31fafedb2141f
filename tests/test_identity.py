"""Ids: checked, derived and hashed."""

import hashlib
import hmac
from uuid import UUID

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from turntrace.errors import IdentityError, TurntraceError
from turntrace.identity import (
    MAX_ID_LENGTH,
    check_id,
    check_text,
    derived_id,
    hash_user,
    is_trace_id,
    new_hash_key,
    new_id,
    safe_id,
)

steady = settings(deadline=None, derandomize=True)
KEY = b"0123456789abcdef0123456789abcdef"
SOME_UUID = UUID("12345678-1234-5678-1234-567812345678")


# --- hashing users ----------------------------------------------------------------------------------------------------
def test_the_hash_of_a_user_is_the_hmac_sha256_of_rfc_4231() -> None:
    assert hash_user("what do ya want for nothing?", b"Jefe") == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )
    assert hash_user("Hi There", b"\x0b" * 20) == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"


@steady
@given(st.text(min_size=1), st.binary(min_size=16, max_size=64))
def test_the_hash_of_a_user_is_what_the_standard_library_says(user_id: str, key: bytes) -> None:
    expected = hmac.digest(key, user_id.encode("utf-8", "surrogatepass"), "sha256").hex()
    assert hash_user(user_id, key) == expected == hash_user(user_id, key)


def test_another_user_or_another_key_gives_another_hash() -> None:
    hashes = {hash_user(user, key) for user in ("alice", "bob", "Alice", "alice ") for key in (KEY, KEY[::-1])}
    assert len(hashes) == 8


def test_a_number_is_the_same_user_as_its_digits() -> None:
    assert hash_user(42, KEY) == hash_user("42", KEY)
    assert hash_user(SOME_UUID, KEY) == hash_user(str(SOME_UUID), KEY)


@pytest.mark.parametrize("user_id", ["", None, True, 1.5, b"alice", ["alice"], {"id": "alice"}])
def test_what_cannot_be_a_user_is_refused_without_being_shown(user_id: object) -> None:
    with pytest.raises(IdentityError, match="user_id") as error:
        hash_user(user_id, KEY)
    assert "alice" not in str(error.value)


def test_a_new_key_is_long_and_never_the_same() -> None:
    assert len(new_hash_key()) == 32
    assert new_hash_key() != new_hash_key()


# --- ids of the app ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value", ["c-42", "a", "x" * 200, "with space", "~!@#$%^&*()", 7, 0, -1, SOME_UUID, "sha256-abc"]
)
def test_an_id_that_langfuse_takes_is_returned_as_a_string(value: object) -> None:
    assert check_id(value, "session_id") == str(value)


BAD_IDS = [
    ("", "it is empty"),
    ("secret" * 34, "it has 204 characters"),
    ("secret-ü", r"its character 8 is U\+00FC"),
    ("secret\n", r"its character 7 is U\+000A"),
    ("\tsecret", r"its character 1 is U\+0009"),
    ("secret\x7f", r"its character 7 is U\+007F"),
    ("secret\x00", r"its character 7 is U\+0000"),
    ("secret\ud800", r"its character 7 is U\+D800"),
    ("秘密secret", r"its character 1 is U\+79D8"),
    ("secret😀", r"its character 7 is U\+1F600"),
    (None, "is a NoneType"),
    (True, "is a bool"),
    (1.5, "is a float"),
    (b"secret", "is a bytes"),
    (["secret"], "is a list"),
    ({"id": "secret"}, "is a dict"),
]


@pytest.mark.parametrize(("value", "why"), BAD_IDS, ids=lambda value: ascii(value)[:20])
def test_a_bad_id_is_refused_with_what_is_wrong_what_is_allowed_and_what_to_type(value: object, why: str) -> None:
    with pytest.raises(IdentityError, match=why) as error:
        check_id(value, "session_id")
    message = str(error.value)
    assert message.startswith("session_id")
    assert "Allowed" in message
    assert "Pass " in message
    assert "secret" not in message
    assert message.isascii()


def test_an_identity_error_is_a_turntrace_error_and_a_value_error() -> None:
    with pytest.raises(TurntraceError):
        check_id("", "session_id")
    with pytest.raises(ValueError, match="empty"):
        check_id("", "session_id")


# --- ids that the app has no choice over ------------------------------------------------------------------------------
@steady
@given(st.one_of(st.text(min_size=1), st.integers(), st.uuids()))
def test_a_safe_id_can_always_be_used_and_is_always_the_same(value: object) -> None:
    made = safe_id(value)
    assert check_id(made, "id") == made
    assert safe_id(value) == made
    assert safe_id(made) == made


@steady
@given(st.text(min_size=1), st.text(min_size=1))
def test_different_ids_stay_different(one: str, other: str) -> None:
    assume(one != other)
    assert safe_id(one) != safe_id(other)


@steady
@given(st.text(alphabet=st.characters(codec="ascii", min_codepoint=32, max_codepoint=126), min_size=1, max_size=200))
def test_a_good_id_stays_as_it_is(value: str) -> None:
    assert safe_id(value) == value


def test_an_id_that_is_too_long_keeps_its_end_in_the_hash() -> None:
    assert safe_id("x" * 201) != safe_id("x" * 202)
    assert len(safe_id("x" * 5_000_000)) <= MAX_ID_LENGTH
    assert safe_id("x" * 200) == "x" * 200


def test_a_safe_id_does_not_hold_what_it_stands_for() -> None:
    assert safe_id("jürgen@example.com").startswith("sha256-")
    assert "rgen" not in safe_id("jürgen@example.com")


@pytest.mark.parametrize("value", ["", None, False, 2.5, b"x", object()])
def test_nothing_safe_can_be_made_of_what_is_no_id(value: object) -> None:
    with pytest.raises(IdentityError, match="thread"):
        safe_id(value, "thread")


# --- short texts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["billing", "Rückfrage", "料金", "x" * 200, 3])
def test_a_short_text_is_taken_in_any_script(value: object) -> None:
    assert check_text(value, "topic") == str(value)


@pytest.mark.parametrize("value", ["", "secret" * 34, None, True, ["secret"], "secret\ud800", "secret\x00"])
def test_a_text_that_cannot_be_kept_is_refused(value: object) -> None:
    # A lone surrogate cannot be written as UTF-8, and so neither into the ledger nor into a span; a NUL not into
    # PostgreSQL.
    with pytest.raises(IdentityError, match="topic") as error:
        check_text(value, "topic")
    assert "secret" not in str(error.value)
    assert "Allowed" in str(error.value)


# --- ids of our own ---------------------------------------------------------------------------------------------------
def test_new_ids_have_the_form_of_a_trace_id_and_are_never_the_same() -> None:
    made = {new_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(is_trace_id(each) for each in made)


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        ("0" * 31 + "1", True),
        ("abcdef0123456789" * 2, True),
        ("0" * 32, False),
        ("A" * 32, False),
        ("a" * 31, False),
        ("a" * 33, False),
        ("g" * 32, False),
        ("", False),
        ("٣" * 32, False),
    ],
)
def test_what_a_trace_id_is(value: str, is_one: bool) -> None:
    assert is_trace_id(value) is is_one


def test_a_derived_id_is_always_the_same() -> None:
    # The value itself is a promise: ids that derive from a transcript must be the same in the next release.
    assert derived_id("root", "t1") == hashlib.sha256(b"4:root\x1f2:t1").hexdigest()[:32]


@steady
@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_derived_ids_differ_when_the_parts_do(one: list[str], other: list[str]) -> None:
    assume(one != other)
    assert derived_id(*one) != derived_id(*other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", "b"), ("b", "a")),
        (("a",), ("a", "")),
        ((), ("",)),
        (("a\x1f1:b",), ("a", "b")),
        (("1:a",), ("a",)),
    ],
)
def test_the_boundaries_and_the_order_of_the_parts_count(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert derived_id(*one) != derived_id(*other)


@steady
@given(st.lists(st.text()))
def test_a_derived_id_has_the_form_of_a_trace_id(parts: list[str]) -> None:
    assert is_trace_id(derived_id(*parts))
