"""The OpenAPI document: FastAPI's, with problem details as errors, the API key, and examples."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from api.bodies import DOCUMENTED
from api.middleware import PROTECTED
from api.openapi.errors import ALWAYS
from api.openapi.examples import EXAMPLES
from tpo.settings import Settings

_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_ALWAYS = {
    str(status): {"description": answer["description"], "content": answer["content"]}
    for status, answer in ALWAYS.items()
}

_SUMMARIES = {
    "get_index": "Get the index",
    "get_health": "Check liveness",
    "get_readiness": "Check readiness",
    "get_metrics": "Get metrics",
    "create_job": "Create a job",
    "list_jobs": "List jobs",
    "get_job": "Get a job",
    "delete_job": "Delete a job",
    "cancel_job": "Cancel a job",
    "pause_job": "Pause a job",
    "resume_job": "Resume a job",
    "retry_job": "Retry a job",
    "extend_job": "Extend a job",
    "list_iterations": "List the iterations of a job",
    "list_candidates": "List the candidates of a job",
    "list_events": "List or stream the events of a job",
    "create_response": "Create a response",
    "get_response": "Get a response",
    "delete_response": "Delete a response",
    "cancel_response": "Cancel a response",
    "list_input_items": "List the input of a response",
    "create_chat_completion": "Create a chat completion",
    "upload_file": "Upload a file",
    "list_files": "List files",
    "get_file": "Get a file",
    "get_file_content": "Download a file",
    "delete_file": "Delete a file",
    "create_batch": "Create a batch",
    "list_batches": "List batches",
    "get_batch": "Get a batch",
    "cancel_batch": "Cancel a batch",
    "delete_batch": "Delete a batch",
    "create_webhook": "Create a webhook",
    "list_webhooks": "List webhooks",
    "get_webhook": "Get a webhook",
    "update_webhook": "Update a webhook",
    "delete_webhook": "Delete a webhook",
    "rotate_webhook_secret": "Rotate the secret of a webhook",
    "test_webhook": "Send a test event to a webhook",
    "list_webhook_deliveries": "List the deliveries of a webhook",
    "list_models": "List models",
    "get_model": "Get a model",
    "list_reward_models": "List reward models",
    "list_prompt_sets": "List prompt sets",
}
"""Summary of each operation, by operation id (the name of the route's function)."""


def _problem(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the description of an error's response, with the path in its examples."""
    shown = {}
    for code, example in answer["content"]["application/json"]["examples"].items():
        value = example["value"]  # FastAPI leaves out null values
        shown[code] = {"value": {**value, "instance": path, "error": {"param": None, **value["error"]}}}
    content = {"application/problem+json": {"schema": _PROBLEM, "examples": shown}}
    return {"description": answer["description"], "content": content}


_BODIES = "/bodies/"


def _body_routes() -> list[APIRoute]:
    """Return a route for each body that a route reads itself (`api.bodies`), so that FastAPI describes it."""
    routes = []
    for operation_id, (model, required) in DOCUMENTED.items():

        def read(body: Any) -> None: ...

        read.__annotations__["body"] = model if required else model | None
        read.__defaults__ = None if required else (None,)
        routes.append(APIRoute(_BODIES + operation_id, read, methods=["POST"], responses={422: {}}))
    return routes


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of the application."""
    if app.openapi_schema is None:
        routes = [*app.routes, *_body_routes()]
        described = get_openapi(title=app.title, version=app.version, description=app.description, routes=routes)
        bodies = {name: described["paths"].pop(_BODIES + name)["post"]["requestBody"] for name in DOCUMENTED}
        settings: Settings = app.state.settings
        # A server without keys requires none, and its first key may be created while it runs.
        secured: list[dict[str, list[str]]] = [{"key": []}, *([] if settings.api_key or settings.require_key else [{}])]
        for path, operations in described["paths"].items():
            for operation in operations.values():
                operation["summary"] = _SUMMARIES[operation["operationId"]]
                if body := bodies.get(operation["operationId"]):
                    operation["requestBody"] = body
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
