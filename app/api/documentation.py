"""The page for people at /docs: the OpenAPI document as HTML, without scripts or foreign hosts."""

from html import escape
from typing import Any

import orjson


def render_documentation(openapi: bytes) -> bytes:
    """Render an OpenAPI document as one HTML page."""
    document = orjson.loads(openapi)
    info = document["info"]
    by_tag: dict[str, list[str]] = {tag["name"]: [] for tag in document["tags"]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag[operation["tags"][0]].append(_operation(path, method, operation, document))
    sections = "".join(f"<h2>{escape(tag)}</h2>{''.join(each)}" for tag, each in by_tag.items())
    schemas = "".join(
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code>'
        f" {_inline(schema.get('description', ''))}</summary>{_schema(schema)}</details>"
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    paragraphs = "".join(f"<p>{_inline(each)}</p>" for each in info["description"].split("\n\n"))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>"
        f"<p><strong>{escape(info['summary'])}</strong></p>{paragraphs}"
        f'<p>For programs: <a href="/openapi.json">/openapi.json</a></p>'
        f"{sections}<h2>Documents</h2>{schemas}</main></body></html>"
    )
    return page.encode()


def _operation(path: str, method: str, operation: dict[str, Any], document: dict[str, Any]) -> str:
    parameters = "".join(
        f"<tr><td><code>{escape(each['name'])}</code></td><td>{escape(each['in'])}</td>"
        f"<td>{_inline(each['description'])}</td></tr>"
        for each in (_resolve(parameter, document) for parameter in operation["parameters"])
    )
    body = ""
    if "requestBody" in operation:
        media_types = operation["requestBody"]["content"]
        body = (
            f"<h4>Body</h4><p>{' or '.join(f'<code>{escape(m)}</code>' for m in media_types)}</p>"
        )
        body += _schema(next(iter(media_types.values()))["schema"])
    responses = "".join(
        f"<tr><td>{escape(status)}</td><td>{_response(_resolve(response, document))}</td></tr>"
        for status, response in operation["responses"].items()
    )
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code>"
        f" {_inline(operation['summary'])}</summary>"
        f"<h4>Parameters</h4><table>{parameters}</table>{body}"
        f"<h4>Answers</h4><table>{responses}</table></details>"
    )


def _response(response: dict[str, Any]) -> str:
    content = next(iter(response.get("content", {}).values()), None)
    link = ""
    if content and "$ref" in content["schema"]:
        name = escape(content["schema"]["$ref"].rpartition("/")[2])
        link = f' <a href="#{name}">{name}</a>'
    return _inline(response["description"]) + link


def _schema(schema: dict[str, Any]) -> str:
    text = orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode()
    return f"<pre>{escape(text)}</pre>"


def _resolve(node: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    target: Any = document
    for name in node["$ref"].removeprefix("#/").split("/"):
        target = target[name]
    return dict(target)


def _inline(text: str) -> str:
    """Write text as HTML, with what stands in backticks as code."""
    parts = escape(text).split("`")
    return "".join(
        f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts)
    )


_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:2rem auto;padding:0 1rem}
h1 small{font-weight:400;opacity:.6}
h2{margin-top:2.5rem}
code,pre{font:14px/1.45 ui-monospace,monospace}
pre{overflow:auto;padding:.75rem;border:1px solid #8884;border-radius:6px}
details{border:1px solid #8884;border-radius:6px;margin:.4rem 0;padding:.4rem .8rem}
summary{cursor:pointer}
summary b{display:inline-block;min-width:4.5rem}
table{border-collapse:collapse;width:100%}
td{border-top:1px solid #8884;padding:.3rem .6rem .3rem 0;vertical-align:top}
"""
