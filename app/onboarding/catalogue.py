"""The step catalogue: which steps a wizard has. Data from a file, never code.

A session keeps the catalogue it began with, so a catalogue is known by its `pin`: its version and
a digest of its content. An edited file without a new version is another pin and harms nobody.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any

import jsonschema_rs
import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from typing_extensions import TypedDict

from app.errors import Fault, InvalidStepDataError, InvalidStepIdError, RequestError
from app.onboarding.documents import Document, Faults, json_pointer

EXACT_POINTERS_BYTES = 16 * 1024
"""Largest answers whose faults are looked up once more for pointers to members called "" or "007":
the look-up lists every fault at once, which a large document could make endless."""

MAX_STEPS = 999
"""Most steps a catalogue may have: a session is read whole, in one command."""


class CatalogueError(ValueError):
    """A catalogue cannot be used; the message says where and why, in one line."""


def _is_schema(value: object) -> object:
    if value is not None and not isinstance(value, dict | bool):
        raise ValueError("a schema is an object, true or false")
    return value


class CatalogueStep(BaseModel):
    """One step as the file describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    key: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    title: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    phase: Annotated[int, Field(ge=1)]
    required: bool
    help: Annotated[str, StringConstraints(min_length=1, max_length=4000)] | None = None
    json_schema: Annotated[Any, AfterValidator(_is_schema)] = Field(default=None, alias="schema")


class CatalogueView(TypedDict):
    """A catalogue as clients see it."""

    version: str
    total: int
    steps: list[CatalogueStep]


class Catalogue:
    """The steps 1 to `total` of a wizard, with the schema each one's answers must meet."""

    def __init__(self, version: str, steps: Iterable[CatalogueStep]) -> None:
        """Take steps numbered 1 to N in order. Raises `CatalogueError` for an unfit schema."""
        self.version = version
        self.steps = tuple(steps)
        self.total = len(self.steps)
        self.required = frozenset(step.id for step in self.steps if step.required)
        self._validators = {
            step.id: _compile(step.json_schema, step.id)
            for step in self.steps
            if step.json_schema is not None
        }

    @classmethod
    def parse(cls, text: bytes) -> "Catalogue":
        """Read a catalogue file: JSON with `version` and `steps`. Raises `CatalogueError`."""
        try:
            file = _CatalogueFile.model_validate(Document.parse(text).value)
        except RequestError as unfit:
            place = unfit.faults[0]["pointer"] if unfit.faults else ""
            raise CatalogueError(f"{place or '/'}: {unfit.detail}") from None
        except ValidationError as unfit:
            first = unfit.errors(include_url=False, include_input=False)[0]
            raise CatalogueError(f"{json_pointer(first['loc']) or '/'}: {first['msg']}") from None
        for number, step in enumerate(file.steps, start=1):
            if step.id != number:
                raise CatalogueError(f"/steps/{number - 1}/id: steps are numbered 1 to N in order")
        if len({step.key for step in file.steps}) != len(file.steps):
            raise CatalogueError("/steps: every step needs a key of its own")
        return cls(file.version, file.steps)

    @cached_property
    def text(self) -> bytes:
        """The catalogue as JSON, in one spelling for one content."""
        steps = [step.model_dump(by_alias=True, exclude_none=True) for step in self.steps]
        return orjson.dumps({"version": self.version, "total": self.total, "steps": steps})

    @cached_property
    def pin(self) -> str:
        """What a session remembers of its catalogue: `<version>@<digest of the content>`."""
        # The order of members means nothing in JSON (RFC 8259 section 4).
        content = orjson.dumps(orjson.loads(self.text), option=orjson.OPT_SORT_KEYS)
        return f"{self.version}@{hashlib.sha256(content).hexdigest()[:16]}"

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The numbers of the steps by how they are written."""
        return {str(step.id): step.id for step in self.steps}

    @cached_property
    def summary_lines(self) -> list[str]:
        """How the JSON about each step begins in a summary, up to whether there is a draft."""
        texts = [
            orjson.dumps(
                {
                    "step_id": step.id,
                    "key": step.key,
                    "title": step.title,
                    "required": step.required,
                }
            ).decode()
            for step in self.steps
        ]
        return [text.removesuffix("}") + ',"has_draft":' for text in texts]

    def __contains__(self, step_id: object) -> bool:
        return isinstance(step_id, int) and 1 <= step_id <= self.total

    def check_step_id(self, step_id: int, at: str | None = None) -> None:
        """Raise `InvalidStepIdError` unless the number is a step of this catalogue.

        `at` points to where the number stands in the caller's document, if it does.
        """
        if step_id not in self:
            detail = f"Steps are numbered 1 to {self.total}"
            faults = [] if at is None else [Fault(pointer=at, code="step_id", detail=detail)]
            raise InvalidStepIdError(detail, faults)

    def check_data(self, step_id: int, data: Document, at: str) -> None:
        """Raise `InvalidStepDataError` unless the answers suit the step.

        Answers are a non-empty object that meets the step's schema, if it has one. Every fault is
        named by its pointer, `at` being where the answers stand in the caller's document.
        """
        if not data.value:
            fault = Fault(pointer=at, code="min_properties", detail="Send at least one answer")
            raise InvalidStepDataError("A step needs at least one answer", [fault])
        validator = self._validators.get(step_id)
        if validator is not None and not validator.is_valid(data.value):
            faults = _faults(validator, data.value, len(data.text), at)
            raise InvalidStepDataError("The answers do not meet the step's schema", faults)

    def missing(self, saved: Iterable[int]) -> list[int]:
        """Return the numbers of the steps that are not in `saved`, ascending."""
        return sorted(set(range(1, self.total + 1)) - set(saved))


def parse_step_id(text: str) -> int:
    """Read a step number as it stands in a path: decimal digits without sign or leading zero.

    Raises `InvalidStepIdError`. Whether a catalogue has the step is for `check_step_id`.
    """
    if not _STEP_ID.fullmatch(text):
        raise InvalidStepIdError("A step is named by its number: 1, 2, 3 and so on")
    return int(text)


_STEP_ID = re.compile(r"[1-9][0-9]{0,2}")


class _CatalogueFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    version: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    steps: Annotated[list[CatalogueStep], Field(min_length=1, max_length=MAX_STEPS)]


def _compile(schema: dict[str, Any] | bool, step_id: int) -> jsonschema_rs.Validator:
    # offline: a `$ref` to another host would let a catalogue make the service fetch addresses.
    # mask: messages would quote the answers otherwise. Formats are checked, as authors expect.
    try:
        return jsonschema_rs.validator_for(schema, offline=True, mask="***", validate_formats=True)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as unfit:
        reason = str(unfit).partition("\n")[0]
        raise CatalogueError(f"/steps/{step_id - 1}/schema: {reason}") from None


_NAMES_MEMBERS = frozenset({"additionalProperties", "unevaluatedProperties", "propertyNames"})
"""Keywords whose messages name members that the user wrote, which the mask leaves standing."""


def _faults(validator: jsonschema_rs.Validator, value: object, size: int, at: str) -> list[Fault]:
    pointers = _exact_pointers(validator, value) if size <= EXACT_POINTERS_BYTES else {}
    faults = Faults()
    for found in validator.iter_errors(value):
        alike = pointers.get(_simplified(found.instance_path), [])
        pointer = alike[0] if alike else json_pointer(found.instance_path)
        if len(set(alike)) > 1:
            alike.pop(0)
        keyword = _keyword(found)
        unknown = "A member is not allowed here; the schema names those that are"
        detail = unknown if keyword in _NAMES_MEMBERS else found.message
        faults.append(Fault(pointer=at + pointer, code=keyword, detail=detail))
        if faults.enough:
            break
    return faults


def _exact_pointers(
    validator: jsonschema_rs.Validator, value: object
) -> dict[tuple[str, ...], list[str]]:
    # The validator gives the path of a fault with "007" and "+7" read as 7, and "" left out. An
    # evaluation finds the same faults in the same order and knows the pointers, but not the mask.
    pointers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for error in validator.evaluate(value).errors():
        pointer = error["instanceLocation"]
        pointers[_simplified(pointer.split("/"))].append(pointer)
    return pointers


def _keyword(found: jsonschema_rs.ValidationError) -> str:
    last = next((part for part in reversed(found.schema_path) if isinstance(part, str)), "false")
    if found.kind.name == "propertyNames":
        return "propertyNames"
    # `false` in the place of a schema: what stands before it is often a member's name.
    return "false" if found.kind.name == "falseSchema" and last not in _NAMES_MEMBERS else last


def _simplified(path: Iterable[str | int]) -> tuple[str, ...]:
    tokens = (str(token).replace("~1", "/").replace("~0", "~") for token in path)
    return tuple(
        token.removeprefix("+").lstrip("0") or "0" if _LIKE_INDEX.fullmatch(token) else token
        for token in tokens
        if token
    )


# What the validator takes for a number, with "+7" among it.
_LIKE_INDEX = re.compile(r"\+?\d+")
