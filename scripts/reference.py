"""Write the reference of the HTTP API, from its OpenAPI document, as a page of the documentation site.

python -m scripts.reference FILE
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api.app import create_app
from tpo.settings import Settings

Lines = Iterator[str]


def http_page() -> str:
    """Return the page on all operations of the API and on the objects that they exchange."""
    document = create_app(Settings()).openapi()
    by_tag: dict[str, list[tuple[str, str, Any]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation.get("tags", ["server"])[0], []).append((method.upper(), path, operation))
    lines = [
        "# HTTP reference",
        "",
        "All operations and objects of the API. A running server has the same at `/docs`, to try it out, and at",
        "`/openapi.json`. [HTTP API](api.md) is a tour with examples. Every error is a [`Problem`](#problem).",
        "",
    ]
    for tag, operations in by_tag.items():
        lines += [f"## {'OpenAI' if tag == 'openai' else tag.capitalize()}", ""]
        for method, path, operation in operations:
            lines += _operation(method, path, operation)
    lines += ["## Objects", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += _object(name, schema)
    return "\n".join(lines)


def _operation(method: str, path: str, operation: dict[str, Any]) -> Lines:
    yield f"### {operation['summary']} {{ #{operation['operationId'].replace('_', '-')} }}"
    yield ""
    yield f"```http\n{method} {path}\n```"
    yield ""
    yield operation.get("description", "")
    yield ""
    parameters = operation.get("parameters", ())
    if parameters:
        yield from _table(
            ("parameter", "in", "type", "meaning"),
            (
                (
                    f"`{each['name']}`" + ("" if each.get("required") else " (optional)"),
                    each["in"],
                    _type(each["schema"]),
                    each.get("description", ""),
                )
                for each in parameters
            ),
        )
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Request body: {_type(content['schema'])} as `{kind}`."
        yield ""
    yield from _table(
        ("status", "body", "meaning"),
        (
            (f"`{status}`", _body(answer), _codes(answer) or answer["description"])
            for status, answer in sorted(operation["responses"].items())
        ),
    )


def _body(answer: dict[str, Any]) -> str:
    found = [_type(each["schema"]) for each in answer.get("content", {}).values() if each.get("schema")]
    return ", ".join(dict.fromkeys(found))


def _codes(answer: dict[str, Any]) -> str:
    codes = [code for each in answer.get("content", {}).values() for code in each.get("examples", {})]
    return f"{answer['description']}: {', '.join(f'`{code}`' for code in codes)}" if codes else ""


def _object(name: str, schema: dict[str, Any]) -> Lines:
    yield f"### {name}"
    yield ""
    yield schema.get("description", "")
    yield ""
    required = schema.get("required", ())
    yield from _table(
        ("field", "type", "default", "meaning"),
        (
            (
                f"`{field}`" + (" (required)" if field in required and "default" not in each else ""),
                _type(each),
                f"`{each['default']}`" if each.get("default") is not None else "",
                each.get("description", ""),
            )
            for field, each in schema.get("properties", {}).items()
        ),
    )


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a JSON schema in words, with links to objects."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{each}`" for each in schema["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[key]))
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    limits = [
        f"{words} {schema[key]}"
        for key, words in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "up to"),
            ("exclusiveMaximum", "below"),
            ("minLength", "at least"),
            ("maxLength", "at most"),
        )
        if key in schema
    ]
    return f"{schema.get('type', 'any')}" + (f" ({', '.join(limits)})" if limits else "")


def _table(head: tuple[str, ...], rows: Iterator[tuple[str | None, ...]]) -> Lines:
    cells = [[_one_line(cell) for cell in row] for row in rows]
    if not cells:
        return
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in cells:
        yield f"| {' | '.join(row)} |"
    yield ""


def _one_line(text: str | None) -> str:
    """Return a text without line breaks and without bars that would end a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", re.sub(r"\s+", " ", text or "")).strip()


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(http_page(), encoding="utf-8")
