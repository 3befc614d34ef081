"""What the tests of the served document share: the document, and its schemas as validators."""

from functools import cache
from typing import Any

import jsonschema_rs
import orjson

from app.api.openapi import describe_operations
from app.api.routes import OPERATIONS


@cache
def described() -> dict[str, Any]:
    """Give the document as the table of operations describes it; another test reads it served."""
    document: dict[str, Any] = orjson.loads(describe_operations(OPERATIONS))
    return document


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference inside the document."""
    while "$ref" in node:
        target: Any = described()
        for name in node["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        node = target
    return node


def validator_of(schema: dict[str, Any], *, closed: bool = False) -> jsonschema_rs.Validator:
    """Make a validator for a schema of the document.

    `closed` admits no member that is not described, where the schema lists members at all.
    """
    whole = {"components": described()["components"], **schema}
    return jsonschema_rs.validator_for(
        _close(whole) if closed else whole, offline=True, validate_formats=True
    )


def _close(node: Any) -> Any:
    if isinstance(node, list):
        return [_close(each) for each in node]
    if not isinstance(node, dict):
        return node
    children = {name: _close(each) for name, each in node.items()}
    if node.get("type") == "object" and "properties" in node:
        children.setdefault("additionalProperties", False)
    return children
