"""Hooks of schemathesis: some requests name things that exist, so that an operation is seen doing its work.

Loaded into its process by SCHEMATHESIS_HOOKS. FUZZ_API and FUZZ_DATABASE say where the server and its database are;
each answer is written down in FUZZ_LOG as a line: method, path, status.
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
_log = open(os.environ["FUZZ_LOG"], "a", buffering=1)  # noqa: SIM115 - as long as the process
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
        with suppress(WrongStateError):  # it had ended before: another one
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
    """One of those that there are: there cannot be many. Those that were switched off are on again."""
    for webhook in _api.get("/v1/webhooks?limit=1").json()["data"]:
        return str(_api.patch(f"/v1/webhooks/{webhook['id']}", json={"enabled": True}).json()["id"])
    return _post("/webhooks", json={"url": HOOK})


_OF_OPERATION: dict[str, Callable[[], str]] = {
    "DELETE /v1/jobs/{job_id}": _ended,
    "POST /v1/jobs/{job_id}/pause": _live,
    "POST /v1/jobs/{job_id}/resume": _paused,
    "POST /v1/jobs/{job_id}/retry": _cancelled,
    "DELETE /v1/responses/{response_id}": _ended,
    "DELETE /v1/files/{file_id}": _file,
    "DELETE /v1/batches/{batch_id}": _ended_batch,
    "POST /v1/batches/{batch_id}/cancel": _batch,
}
"""What an operation needs anew each time."""
_OF_PARAMETER: dict[str, Callable[[], str]] = {
    "job_id": _ended,
    "response_id": _ended,
    "file_id": _file,
    "batch_id": _batch,
    "webhook_id": _webhook,
    "model_id": lambda: "scripted",
}
_OF_FIELD: dict[str, Callable[[], str]] = {
    "model": lambda: "scripted",
    "input_file_id": lambda: _known("", "file_id"),
}
_CHANCE = {"Idempotency-Key", "If-None-Match"}
"""Headers whose values say something only where another request has said the same."""
_KEPT = {"job_id": "jobs", "response_id": "jobs", "file_id": "files", "batch_id": "batches"}
"""Made once, and again where a request has forgotten it."""
_kept: dict[str, str] = {}


def _known(operation: str, parameter: str) -> str:
    if operation in _OF_OPERATION:
        found = _OF_OPERATION[operation]()
    elif parameter in _KEPT:
        found = _kept.get(parameter, "")
        if not found or _api.get(f"/v1/{_KEPT[parameter]}/{found}").status_code != 200:
            found = _kept[parameter] = _OF_PARAMETER[parameter]()
    else:
        found = _OF_PARAMETER[parameter]()
    return found.replace("job_", "resp_", 1) if parameter == "response_id" else found


@schemathesis.hook
def before_call(_context: schemathesis.HookContext, case: schemathesis.Case[Any], _kwargs: dict[str, Any]) -> None:
    """Let two of three requests name what exists; the third is as it was made."""
    operation = f"{case.method.upper()} {case.path}"
    _seen[operation] += 1
    if _seen[operation] % 3 == 0:
        return
    for parameter in set(case.path_parameters or {}) & set(_OF_PARAMETER):
        case.path_parameters[parameter] = _known(operation, parameter)
    for name in _CHANCE & set(case.headers or {}):
        del case.headers[name]
    if isinstance(case.body, dict):
        for name in set(case.body) & set(_OF_FIELD):
            case.body[name] = _OF_FIELD[name]()


@schemathesis.hook
def after_call(
    _context: schemathesis.HookContext, case: schemathesis.Case[Any], response: schemathesis.Response
) -> None:
    """Write down how it was answered."""
    print(case.method.upper(), case.path, response.status_code, file=_log)
