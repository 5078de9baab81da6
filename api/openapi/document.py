"""The OpenAPI document, with what FastAPI cannot know: how errors are sent, and the API key."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.middleware import PROTECTED
from api.openapi.errors import ALWAYS
from api.openapi.examples import EXAMPLES
from tpo.settings import Settings

_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_ALWAYS = {
    str(status): {"description": answer["description"], "content": answer["content"]}
    for status, answer in ALWAYS.items()
}


def _problem(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    """How an address tells of an error: its examples name it."""
    shown = {}
    for code, example in answer["content"]["application/json"]["examples"].items():
        value = example["value"]  # out of which FastAPI leaves the nulls
        shown[code] = {"value": {**value, "instance": path, "error": {"param": None, **value["error"]}}}
    content = {"application/problem+json": {"schema": _PROBLEM, "examples": shown}}
    return {"description": answer["description"], "content": content}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The description of the API, with what FastAPI cannot know: how errors are sent, and the key."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        settings: Settings = app.state.settings
        # A server without any key asks for none, and it may have its first one made while it runs.
        secured: list[dict[str, list[str]]] = [{"key": []}, *([] if settings.api_key or settings.require_key else [{}])]
        for path, operations in described["paths"].items():
            for operation in operations.values():
                if path.startswith(PROTECTED):
                    operation["security"] = secured
                    operation["responses"] = {**_ALWAYS, **operation["responses"]}
                for status, answer in operation["responses"].items():
                    if int(status) >= 400:
                        operation["responses"][status] = _problem(path, answer)
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, shown in EXAMPLES.items():
            described["components"]["schemas"][name]["examples"] = [shown]
        app.openapi_schema = described
    return app.openapi_schema
