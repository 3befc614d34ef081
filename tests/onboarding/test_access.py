import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.onboarding.access import (
    ApiKey,
    Scope,
    find_api_key,
    is_api_key_name,
    parse_api_keys,
    write_api_key,
)


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


ONE, TWO = sha256("one"), sha256("two")
BCM = ApiKey("bcm", frozenset({Scope.GENERATOR, Scope.ADMIN}), bytes.fromhex(ONE))
SHOP = ApiKey("shop.v-2_b", frozenset({Scope.SESSIONS}), bytes.fromhex(TWO))
FIRST, SECOND = f"bcm:generator+admin:{ONE}", f"shop.v-2_b:sessions:{TWO}"


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"{FIRST},{SECOND}",
        f"{FIRST}\n{SECOND}\n",
        f" {FIRST} , {SECOND} ,",
        f"{FIRST}\r\n\r\n{SECOND}\r\n",
        f"# bcm, since May\n{FIRST}\n  # shop:sessions:x\n\n{SECOND}",
        f"bcm:admin+generator+admin:{ONE.upper()},{SECOND}",
    ],
)
def test_keys_are_divided_by_commas_or_lines(text: str) -> None:
    assert parse_api_keys(text) == (BCM, SHOP)


@pytest.mark.parametrize("text", ["", " ", "\n\n", ",,", "# nothing\n"])
def test_there_may_be_no_key(text: str) -> None:
    assert parse_api_keys(text) == ()


def test_a_name_may_have_several_keys() -> None:
    keys = parse_api_keys(f"bcm:generator:{ONE},bcm:generator:{TWO}")
    assert [key.name for key in keys] == ["bcm", "bcm"]


@pytest.mark.parametrize(
    "entry",
    [
        *("bcm", "bcm:admin", f"bcm:{ONE}", f":admin:{ONE}", f"admin:{ONE}:bcm", ONE),
        *(f"bcm:admin:{ONE}:x", f"bcm:admin:{ONE[:-1]}", f"bcm:admin:{ONE}0", f"bcm:admin: {ONE}"),
        *(
            f"b m:admin:{ONE}",
            f"{'b' * 65}:admin:{ONE}",
            f"bcm\u00e9:admin:{ONE}",
            f"#b:admin:{ONE}",
        ),
        *(f"bcm::{ONE}", f"bcm:root:{ONE}", f"bcm:ADMIN:{ONE}", f"bcm:admin+:{ONE}"),
        *(f"bcm:admin sessions:{ONE}", f"bcm:admin:{ONE[:-1]}g", f"bcm:admin:{ONE[:-1]}\u0661"),
        f"bcm:admin:ok_{'5' * 43}",
    ],
)
def test_what_is_wrong_is_named_by_its_number_and_not_shown(entry: str) -> None:
    with pytest.raises(ValueError, match=r"^entry 2 ") as caught:
        parse_api_keys(f"{SECOND},{entry}")
    said = str(caught.value)
    assert ONE[:-1] not in said
    assert "55" not in said
    assert "bcm" not in said


def test_a_key_stands_once() -> None:
    with pytest.raises(ValueError, match="entry 3 is the one of entry 1") as caught:
        parse_api_keys(f"bcm:admin:{ONE},{SECOND},other:sessions:{ONE.upper()}")
    assert ONE not in str(caught.value)


def test_an_empty_key_is_none() -> None:
    # The hash of a variable that was not set.
    with pytest.raises(ValueError, match="empty key"):
        parse_api_keys(f"bcm:admin:{sha256('')}")


def test_a_key_does_not_show_its_digest() -> None:
    assert repr(BCM) == "ApiKey(bcm)"
    assert f"{BCM}" == "ApiKey(bcm)"


@given(
    name=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    scopes=st.sets(st.sampled_from(Scope), min_size=1),
    key=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_what_is_written_is_read(name: str, scopes: set[Scope], key: str) -> None:
    assert is_api_key_name(name)
    digest = hashlib.sha256(key.encode()).digest()
    assert parse_api_keys(write_api_key(name, scopes, key)) == (
        ApiKey(name, frozenset(scopes), digest),
    )


# --- Finding --------------------------------------------------------------------------------------


def test_a_key_is_found_by_its_bytes() -> None:
    assert find_api_key((BCM, SHOP), b"one") == BCM
    assert find_api_key((BCM, SHOP), b"two") == SHOP


@pytest.mark.parametrize(
    "sent",
    [b"", b"three", b"One", b"one ", b"one\x00", ONE.encode(), bytes.fromhex(ONE), b"\xff\xe9"],
)
def test_nothing_else_is_a_key(sent: bytes) -> None:
    assert find_api_key((BCM, SHOP), sent) is None
    assert find_api_key((), sent) is None
