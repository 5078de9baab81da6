"""Hooks of schemathesis that put ids of existing resources into requests, so that operations succeed.

SCHEMATHESIS_HOOKS loads this module. FUZZ_API and FUZZ_DATABASE are the URLs of the server and its database. Each
response is logged to FUZZ_LOG as a line of method, path and status.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import schemathesis

from tpo.batches.advance import end_batch
from tpo.core.errors import WrongStateError
from tpo.db import connect, writing
from tpo.store import Store

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "Hello"}}\n'
HOOK = "http://127.0.0.1:1/"
ONE_CALL = {"sample_size": 1, "max_iterations": 0}
LONG = {"sample_size": 4, "max_iterations": 2}

_api = httpx.Client(base_url=os.environ["FUZZ_API"], timeout=60)
_store = Store(connect(os.environ["FUZZ_DATABASE"]))
_log = open(os.environ["FUZZ_LOG"], "a", buffering=1)  # noqa: SIM115 - open until the process ends
_seen: Counter[str] = Counter()


def _post(path: str, **request: Any) -> str:
    return str(_api.post(f"/v1{path}", **request).raise_for_status().json()["id"])


def _live() -> str:
    return _post("/jobs", json={"input": "Hello", "parameters": LONG})


def _ended() -> str:
    return _post("/jobs", json={"input": "Hello", "parameters": ONE_CALL}, headers={"prefer": "wait=30"})


def _cancelled() -> str:
    job = _live()
    _store.jobs.cancel(job)
    _api.get(f"/v1/jobs/{job}?wait=30")
    return job


def _paused() -> str:
    while True:
        job = _live()
        with suppress(WrongStateError):  # the job had ended already: try another one
            _store.jobs.pause(job)
            return job


def _file() -> str:
    return _post("/files", data={"purpose": "batch"}, files={"file": ("a", LINE)})


def _batch() -> str:
    return _post("/batches", json={"input_file_id": _file(), "endpoint": "/v1/responses", "completion_window": "24h"})


def _ended_batch() -> str:
    batch = _batch()
    with writing(_store.engine) as session:
        end_batch(session, _store.batches.get(batch), "failed", {"error_code": "empty_file"})
    return batch


def _webhook() -> str:
    """Return an existing webhook, enabled again if it was disabled, because their number is limited."""
    for webhook in _api.get("/v1/webhooks?limit=1").json()["data"]:
        return str(_api.patch(f"/v1/webhooks/{webhook['id']}", json={"enabled": True}).json()["id"])
    return _post("/webhooks", json={"url": HOOK})


_NEW_FOR_OPERATION: dict[str, Callable[[], str]] = {
    "DELETE /v1/jobs/{job_id}": _ended,
    "POST /v1/jobs/{job_id}/pause": _live,
    "POST /v1/jobs/{job_id}/resume": _paused,
    "POST /v1/jobs/{job_id}/retry": _cancelled,
    "DELETE /v1/responses/{response_id}": _ended,
    "DELETE /v1/files/{file_id}": _file,
    "DELETE /v1/batches/{batch_id}": _ended_batch,
    "POST /v1/batches/{batch_id}/cancel": _batch,
}
"""Operations that need a new resource each time, because they change it."""
_FOR_PARAMETER: dict[str, Callable[[], str]] = {
    "job_id": _ended,
    "response_id": _ended,
    "file_id": _file,
    "batch_id": _batch,
    "webhook_id": _webhook,
    "model_id": lambda: "scripted",
}
_FOR_FIELD: dict[str, Callable[[], str]] = {
    "model": lambda: "scripted",
    "input_file_id": lambda: _known("", "file_id"),
}
_DROPPED_HEADERS = {"Idempotency-Key", "If-None-Match"}
"""Headers whose random values would only match an earlier request by chance."""
_REUSED = {"job_id": "jobs", "response_id": "jobs", "file_id": "files", "batch_id": "batches"}
"""Parameters whose resource is created once, and again after a request has deleted it."""
_reusable: dict[str, str] = {}


def _known(operation: str, parameter: str) -> str:
    if operation in _NEW_FOR_OPERATION:
        found = _NEW_FOR_OPERATION[operation]()
    elif parameter in _REUSED:
        found = _reusable.get(parameter, "")
        if not found or _api.get(f"/v1/{_REUSED[parameter]}/{found}").status_code != 200:
            found = _reusable[parameter] = _FOR_PARAMETER[parameter]()
    else:
        found = _FOR_PARAMETER[parameter]()
    return found.replace("job_", "resp_", 1) if parameter == "response_id" else found


@schemathesis.hook
def before_call(_context: schemathesis.HookContext, case: schemathesis.Case[Any], _kwargs: dict[str, Any]) -> None:
    """Put existing ids into two of three requests, and leave the third as it was generated."""
    operation = f"{case.method.upper()} {case.path}"
    _seen[operation] += 1
    if _seen[operation] % 3 == 0:
        return
    for parameter in set(case.path_parameters or {}) & set(_FOR_PARAMETER):
        case.path_parameters[parameter] = _known(operation, parameter)
    for name in _DROPPED_HEADERS & set(case.headers or {}):
        del case.headers[name]
    if isinstance(case.body, dict):
        for name in set(case.body) & set(_FOR_FIELD):
            case.body[name] = _FOR_FIELD[name]()


@schemathesis.hook
def after_call(
    _context: schemathesis.HookContext, case: schemathesis.Case[Any], response: schemathesis.Response
) -> None:
    """Log the status of the response."""
    print(case.method.upper(), case.path, response.status_code, file=_log)
