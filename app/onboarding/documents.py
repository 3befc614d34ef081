"""JSON objects that are kept exactly as they came.

A `Document` is a JSON object as text that reads as a mapping: it travels as bytes and is decoded
only when somebody looks inside. `Document.parse` admits text from outside by the rules of the
service, `Document.of` admits a Python mapping by the same rules.

The rules keep every later reader safe: what passes is read alike by any JSON parser, so nothing
that was stored can turn a later read, checksum or export into an error.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import orjson

from app.errors import Fault, InvalidRequestError, MalformedJsonError, RequestError

MAX_DEPTH = 64
"""Levels of nesting, the document itself being the first. RFC 8259 section 9 allows a limit."""

MAX_INTEGER = 2**53 - 1
"""Largest integer that every JSON parser reads exactly (RFC 8259 section 6, RFC 7493)."""

MAX_FAULTS = 1000
"""How many faults one error names at most."""

MAX_POINTER_CHARS = 64 * 1024
"""How long their pointers may be together: a small body could ask for a large answer otherwise."""


class Faults(list[Fault]):
    """The faults of a document, as many as one error names."""

    @property
    def enough(self) -> bool:
        """Whether no more are wanted."""
        return len(self) >= MAX_FAULTS or self._chars >= MAX_POINTER_CHARS

    _chars = 0

    def append(self, fault: Fault) -> None:
        """Take one more."""
        self._chars += len(fault["pointer"])
        super().append(fault)


class Document(Mapping[str, Any]):
    """A JSON object: `text` is its UTF-8 bytes, and as a mapping it is decoded on first use."""

    __slots__ = ("_spelled_plainly", "_value", "text")

    text: bytes

    def __init__(
        self, text: bytes, value: dict[str, Any] | None = None, *, spelled_plainly: bool = False
    ) -> None:
        """Wrap text that is known to be a JSON object.

        `value` is what it decodes to, if known. `spelled_plainly` says that orjson would write the
        value with the same bytes, so that a part can be written from its value.
        """
        self.text = text
        self._value = value
        self._spelled_plainly = spelled_plainly

    @classmethod
    def parse(cls, text: bytes, error: type[RequestError] = InvalidRequestError) -> Self:
        """Admit JSON from outside.

        Raises `MalformedJsonError` for what is not JSON in UTF-8 and `error` for what is not an
        object, nests deeper than `MAX_DEPTH`, repeats a member, holds a lone surrogate, an integer
        beyond `MAX_INTEGER`, or a number that overflows or underflows a double.
        """
        # A body that orjson would write with the same bytes holds no repeated member, no number
        # that was rounded, and no odd escape; measured at 1.3 us for 1 KB, where a look at every
        # token costs 20. Whatever is spelled otherwise (spaces, escapes, 1e3) gets that look.
        try:
            value = orjson.loads(text)
            plain = orjson.dumps(value, option=orjson.OPT_STRICT_INTEGER) == text
        except (ValueError, TypeError):
            plain = False
        if not plain:
            value = _parse_strictly(text, error)
        elif _may_be_deep(text):
            _check_tree(value, error)
        if not isinstance(value, dict):
            raise error("The document must be a JSON object", [_not_an_object("")])
        return cls(text, value, spelled_plainly=plain)

    @classmethod
    def of(cls, value: Mapping[str, Any], error: type[RequestError] = InvalidRequestError) -> Self:
        """Admit a mapping of dicts, lists, str, int, float, bool and None. Raises `error`."""
        if isinstance(value, cls):
            return value
        plain_value = dict(value)
        try:
            text = orjson.dumps(plain_value, option=_ONLY_JSON)
        except TypeError as unfit:
            raise error(f"The document is not made of JSON values: {unfit}") from None
        # NaN is written as null and a tuple as a list; what does not come back equal was changed.
        if orjson.loads(text) != plain_value:
            raise error("The document holds values that JSON cannot, such as NaN or a tuple")
        if _may_be_deep(text):
            _check_tree(plain_value, error)
        return cls(text, plain_value, spelled_plainly=True)

    @property
    def value(self) -> dict[str, Any]:
        """The object as a dict. It is shared: do not change it."""
        if self._value is None:
            self._value = orjson.loads(self.text)
        return self._value

    def part(self, name: str, error: type[RequestError] = InvalidRequestError) -> "Document":
        """Return the member `name`, an object, with its bytes as they came. Raises `error`."""
        members = self.value
        if name not in members:
            fault = Fault(pointer=f"/{name}", code="required", detail="This member is required")
            raise error(f"The member {name!r} is missing", [fault])
        value = members[name]
        if not isinstance(value, dict):
            raise error(f"The member {name!r} must be an object", [_not_an_object(f"/{name}")])
        if not self._spelled_plainly:
            return Document(_member_texts(self.text.decode())[name].encode(), value)
        if len(members) == 1:
            # `{"<name>":<value>}`, as most bodies are: cut out, where to write it anew takes 1 us.
            text = self.text[len(orjson.dumps(name)) + 2 : -1]
        else:
            text = orjson.dumps(value)
        return Document(text, value, spelled_plainly=True)

    def parts(
        self, at: str, error: type[RequestError] = InvalidRequestError
    ) -> dict[str, "Document"]:
        """Return all members, each an object; `at` points to this document. Raises `error`."""
        wrong = [name for name, value in self.value.items() if not isinstance(value, dict)]
        if wrong:
            faults = [_not_an_object(f"{at}/{escape_pointer(name)}") for name in wrong[:20]]
            raise error(f"Every member of {at} must be an object", faults)
        if self._spelled_plainly:
            return {
                name: Document(orjson.dumps(value), value, spelled_plainly=True)
                for name, value in self.value.items()
            }
        texts = _member_texts(self.text.decode())
        return {name: Document(texts[name].encode(), value) for name, value in self.value.items()}

    def __getitem__(self, name: str) -> Any:
        return self.value[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        # Never the text: it holds answers, and a repr ends up in logs.
        return f"<{type(self).__name__} of {len(self.text)} bytes>"


def merge_patch(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch and return the outcome; neither argument is changed (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def escape_pointer(name: str) -> str:
    """Write a member name as a token of a JSON pointer (RFC 6901 section 3)."""
    return name.replace("~", "~0").replace("/", "~1")


def json_pointer(path: Sequence[str | int]) -> str:
    """Write a path of member names and indexes as a JSON pointer (RFC 6901)."""
    return "".join(f"/{escape_pointer(str(token))}" for token in path)


# --- The long look --------------------------------------------------------------------------------

_ONLY_JSON = (
    orjson.OPT_STRICT_INTEGER
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_SUBCLASS
)


class _Unfit:
    """Stands in the parsed tree where the text held something that is refused."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        self.detail = detail


def _parse_strictly(text: bytes, error: type[RequestError]) -> Any:
    """Parse token by token and return the value. Raises `MalformedJsonError` and `error`."""
    try:
        characters = text.decode("utf-8", "strict")
    except UnicodeDecodeError as bad:
        raise MalformedJsonError(f"The body is not UTF-8 at byte {bad.start}") from None
    if characters.startswith("\ufeff"):
        raise MalformedJsonError("The body begins with a byte order mark; leave it out")
    try:
        tree = _strict_decoder.decode(characters)
    except json.JSONDecodeError as bad:
        place = f"line {bad.lineno}, column {bad.colno}"
        raise MalformedJsonError(f"The body is not JSON at {place}") from None
    except RecursionError:
        raise _too_deep(error) from None
    _check_tree(tree, error)
    return tree


def _check_tree(tree: Any, error: type[RequestError]) -> None:
    """Raise `error` for what parsing marked as unfit, for lone surrogates and for depth."""
    faults = Faults()
    nodes: list[tuple[Any, tuple[str | int, ...]]] = [(tree, ())]
    while nodes and not faults.enough:
        node, path = nodes.pop()
        if isinstance(node, _Unfit):
            faults.append(Fault(pointer=json_pointer(path), code=node.code, detail=node.detail))
        elif isinstance(node, str):
            if not _is_encodable(node):
                faults.append(_lone_surrogate(path))
        elif isinstance(node, dict | list):
            if len(path) >= MAX_DEPTH:
                raise _too_deep(error)
            if isinstance(node, list):
                nodes.extend((child, (*path, index)) for index, child in enumerate(node))
            elif all(map(_is_encodable, node)):
                nodes.extend((child, (*path, name)) for name, child in node.items())
            else:
                faults.append(_lone_surrogate(path))
    if faults:
        raise error("The document holds values that cannot be kept exactly", faults)


def _may_be_deep(text: bytes) -> bool:
    # Fewer brackets than levels cannot be too deep; those inside strings only cost a closer look.
    return text.count(b"{") + text.count(b"[") > MAX_DEPTH


def _is_encodable(characters: str) -> bool:
    try:
        characters.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lone_surrogate(path: Sequence[str | int]) -> Fault:
    detail = "A string holds half of a surrogate pair; send the whole character"
    return Fault(pointer=json_pointer(path), code="lone_surrogate", detail=detail)


def _too_deep(error: type[RequestError]) -> RequestError:
    # The pointer to something this deep would be longer than its use.
    detail = f"The document nests deeper than {MAX_DEPTH} levels"
    return error(detail, [Fault(pointer="", code="depth", detail=detail)])


def _not_an_object(pointer: str) -> Fault:
    return Fault(pointer=pointer, code="type", detail="This must be an object")


def _strict_object(pairs: list[tuple[str, Any]]) -> Any:
    members = dict(pairs)
    if len(members) != len(pairs):
        return _Unfit("duplicate_member", "A member stands twice in this object; send it once")
    return members


def _strict_integer(digits: str) -> Any:
    # Longer ones are out of range for certain, and int() refuses thousands of digits.
    if len(digits) > len(str(MAX_INTEGER)) + 1 or abs(int(digits)) > MAX_INTEGER:
        return _Unfit("integer_range", "Integers reach from -(2^53-1) to 2^53-1; send a string")
    return int(digits)


def _strict_number(spelling: str) -> Any:
    number = float(spelling)
    mantissa = spelling.lower().partition("e")[0]
    if number in (float("inf"), float("-inf")):
        return _Unfit("number_range", "The number is too large for a double; send a string")
    if number == 0 and mantissa.strip("-0."):
        return _Unfit("number_range", "The number is too small for a double; send 0 or a string")
    return number


def _refuse_constant(name: str) -> Any:
    raise MalformedJsonError(f"The body is not JSON: {name} is no JSON value")


_strict_decoder = json.JSONDecoder(
    object_pairs_hook=_strict_object,
    parse_int=_strict_integer,
    parse_float=_strict_number,
    parse_constant=_refuse_constant,
)
_decoder = json.JSONDecoder()


def _member_texts(characters: str) -> dict[str, str]:
    """Cut a JSON object, known to be valid, into the texts of its members' values."""
    texts: dict[str, str] = {}
    at = _skip_space(characters, _skip_space(characters, 0) + 1)
    while characters[at] != "}":
        name, end = _decoder.raw_decode(characters, at)
        start = _skip_space(characters, _skip_space(characters, end) + 1)
        _, end = _decoder.raw_decode(characters, start)
        texts[name] = characters[start:end]
        at = _skip_space(characters, end)
        if characters[at] == ",":
            at = _skip_space(characters, at + 1)
    return texts


def _skip_space(characters: str, at: int) -> int:
    while characters[at] in " \t\n\r":
        at += 1
    return at
