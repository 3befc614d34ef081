"""JSON in every spelling, and an admission rule to compare ours with, made on the stdlib alone."""

import json
import math
import random
from decimal import Decimal
from typing import Any, Final

from hypothesis import strategies as st

from app.errors import InvalidRequestError, MalformedJsonError, RequestError
from app.onboarding.documents import MAX_DEPTH, MAX_INTEGER

texts: Final = st.text(max_size=12)
"""Strings that any JSON can carry: control characters and what lies beyond the BMP included."""

integers: Final = st.integers(-MAX_INTEGER, MAX_INTEGER) | st.sampled_from(
    [0, MAX_INTEGER, -MAX_INTEGER, 2**32, -(2**31)]
)
floats: Final = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 1e16, 1e21, 1e-7, 0.1]
)
scalars: Final = st.none() | st.booleans() | integers | floats | texts


def values(*, leaves: int = 12) -> st.SearchStrategy[Any]:
    """Trees of safe JSON values."""
    return st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(member_names, inner, max_size=4)
        ),
        max_leaves=leaves,
    )


member_names: Final = texts | st.sampled_from(["", "a", "data", "steps", "a/b", "m~n", "ä", '"\\'])
objects: Final = st.dictionaries(member_names, values(), max_size=5)


def spell(value: Any, seed: int) -> str:
    """Write a value as JSON in one of its many spellings, chosen by the seed."""
    return _Speller(random.Random(seed)).document(value)


def same(one: Any, other: Any) -> bool:
    """Say whether two values are equal to the last detail: 1, 1.0, True and -0.0 are four."""
    return json.dumps(one) == json.dumps(other)


class _Speller:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        # Some documents are plain, some are odd in a few places, some everywhere.
        self._oddity = chance.choice([0.0, 0.1, 0.8])

    def document(self, value: Any) -> str:
        return f"{self._space()}{self.value(value)}{self._space()}"

    def value(self, value: Any) -> str:
        match value:
            case dict():
                members = [
                    f"{self.string(name)}{self._space()}:{self._space()}{self.value(each)}"
                    for name, each in value.items()
                ]
                return self._enclose("{", members, "}")
            case list():
                return self._enclose("[", [self.value(each) for each in value], "]")
            case str():
                return self.string(value)
            case bool() | None:
                return json.dumps(value)
            case int():
                return "-0" if value == 0 and self._odd() else str(value)
            case _:
                return self.number(value)

    def string(self, text: str) -> str:
        return '"' + "".join(self._character(each) for each in text) + '"'

    def number(self, value: float) -> str:
        plain = json.dumps(value)
        spellings = [
            plain.replace("e", "E"),
            f"{value:.17e}",
            f"{value:.25E}",
            plain.replace("e+", "e").replace("e", "e+0").replace("e+0-", "e-0"),
            plain if "e" in plain else f"{plain}00",
            plain if "e" in plain else f"{plain}e+00",
        ]
        return self._chance.choice(spellings) if self._odd() else plain

    def _enclose(self, opening: str, parts: list[str], closing: str) -> str:
        inside = f"{self._space()},{self._space()}".join(parts)
        return f"{opening}{self._space()}{inside}{self._space()}{closing}"

    def _character(self, character: str) -> str:
        units = character.encode("utf-16-be")
        escapes = [f"\\u{units[at]:02x}{units[at + 1]:02X}" for at in range(0, len(units), 2)]
        spellings = ["".join(escapes), "".join(escapes).lower()]
        if character in _SHORT_ESCAPES:
            spellings.append(_SHORT_ESCAPES[character])
        if character >= " " and character not in '"\\':
            return self._chance.choice(spellings) if self._odd() else character
        return self._chance.choice(spellings) if self._odd() else spellings[-1]

    def _space(self) -> str:
        return "".join(self._chance.choices(" \t\n\r", k=2)) if self._odd() else ""

    def _odd(self) -> bool:
        return self._chance.random() < self._oddity


_SHORT_ESCAPES: Final = {
    character: "\\" + letter
    for character, letter in zip('"\\/\b\f\n\r\t', '"\\/bfnrt', strict=True)
}


def admit(text: bytes) -> dict[str, Any] | type[RequestError]:
    """Judge a body by the contract's rules for JSON bodies, slowly and plainly.

    Returns what it holds, or the error that it deserves.
    """
    unfit: list[str] = []
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=lambda pairs: _object(pairs, unfit),
            parse_int=lambda digits: _integer(digits, unfit),
            parse_float=lambda digits: _float(digits, unfit),
            parse_constant=_constant,
        )
    except ValueError:  # of decode, of the syntax, and json's own word about a byte order mark
        return MalformedJsonError
    except RecursionError:
        return InvalidRequestError
    if unfit or not isinstance(value, dict) or _depth(value) > MAX_DEPTH or _has_surrogate(value):
        return InvalidRequestError
    return value


def _object(pairs: list[tuple[str, Any]], unfit: list[str]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        unfit.append("a member stands twice")
    return dict(pairs)


def _integer(digits: str, unfit: list[str]) -> int:
    number = Decimal(digits)
    if abs(number) > MAX_INTEGER:
        unfit.append("an integer is out of range")
        return 0
    return int(number)


def _float(digits: str, unfit: list[str]) -> float:
    number = float(digits)
    mantissa = digits.lower().split("e")[0]
    if math.isinf(number) or (number == 0 and Decimal(mantissa) != 0):
        unfit.append("a number is out of range")
    return number


def _constant(name: str) -> Any:
    raise ValueError(name)


def _depth(value: Any) -> int:
    match value:
        case dict():
            return 1 + max(map(_depth, value.values()), default=0)
        case list():
            return 1 + max(map(_depth, value), default=0)
        case _:
            return 0


def _has_surrogate(value: Any) -> bool:
    return any("\ud800" <= each <= "\udfff" for each in json.dumps(value, ensure_ascii=False))
