"""Examples of the OpenAPI document, with null values, which FastAPI would leave out."""

import json
from typing import Any

from tpo.core.state import EarlyStop, Params

_PARAMETERS = Params(seed=7, early_stop=EarlyStop(patience=1, min_gain=0.1)).model_dump(mode="json")
_INPUT = "My name is Clara. My lamp is now broken. Can I get a quick refund?"
"""A message that the demo models understand."""
_JOB: dict[str, Any] = {
    "id": "job_0199c0ffee00aa55aa55aa55aa55aa55",
    "object": "job",
    "status": "completed",
    "model": "demo",
    "input": _INPUT,
    "parameters": {
        **_PARAMETERS,
        "reward_model": "demo",
        "prompt_set": "tiny",
        "prompt_set_version": 1,
    },
    "priority": 0,
    "metadata": {"ticket": "4711"},
    "external_id": None,
    "source_id": None,
    "created_at": 1750000000,
    "started_at": 1750000001,
    "completed_at": 1750000009,
    "cancel_requested_at": None,
    "pause_requested_at": None,
    "next_attempt_at": None,
    "deadline_at": None,
    "estimated_finish": None,
    "expires_at": None,
    "attempt": 1,
    "max_attempts": 3,
    "progress": {"iteration": 2, "max_iterations": 2, "phase": None},
    "best": {"iteration": 2, "candidate_id": "2-3", "reward": 4.25},
    "declined_iteration": None,
    "output": "It arrives tomorrow before noon.",
    "error": None,
    "incomplete_details": None,
    "stop_reason": None,
    "usage": {
        "input_tokens": 1800,
        "output_tokens": 2400,
        "total_tokens": 4200,
        "reward_tokens": 1500,
        "model_seconds": 7.5,
    },
}


_SUMMARY: dict[str, Any] = {
    **{name: value for name, value in _JOB.items() if name not in ("input", "output")},
    "input_preview": _JOB["input"],
}


def _page(item: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [item], "first_id": item["id"], "last_id": item["id"], "has_more": False}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [item]}


_DIGITS = _JOB["id"].removeprefix("job_")
_USAGE = _JOB["usage"]
_EVENT: dict[str, Any] = {
    "object": "event",
    "type": "job.phase",
    "sequence_number": 3,
    "job_id": _JOB["id"],
    "created_at": 1750000000,
    "iteration": 0,
    "phase": "sampling",
}
_CANDIDATE: dict[str, Any] = {
    "id": "2-3",
    "object": "candidate",
    "iteration": 2,
    "sample": 3,
    "text": "It arrives tomorrow before noon.",
    "reward": 4.25,
    "parts": [],
    "unusable": None,
    "tokens": 8,
}
_ITERATION: dict[str, Any] = {
    "object": "iteration",
    "number": 2,
    "complete": True,
    "phase": None,
    "chosen": {"id": "1-0", "text": "It arrives tomorrow.", "reward": 3.5},
    "rejected": {"id": "0-4", "text": "Soon.", "reward": -1.25},
    "critique": "The chosen answer names a day; the rejected one says nothing.",
    "gradient": "Name the day and the time of day.",
    "candidates": [{"id": "2-3", "reward": 4.25, "unusable": None}],
    "mean_reward": 4.25,
    "declined": False,
    "best_reward": 4.25,
    "reason": None,
    "usage": _USAGE,
    "calls": [{"kind": "update", "n": 5, "input_tokens": 120, "output_tokens": 40, "seconds": 0.8}],
}
_MODEL: dict[str, Any] = {
    "id": "demo",
    "object": "model",
    "created": 1750000000,
    "owned_by": "tpo",
    "reward_models": ["demo"],
    "workers": 1,
}
_REWARD_MODEL: dict[str, Any] = {
    "id": "demo",
    "object": "reward_model",
    "created": 1750000000,
    "models": ["demo"],
    "workers": 1,
}
_PROMPT_SET: dict[str, Any] = {
    "id": "tiny",
    "object": "prompt_set",
    "version": 1,
    "style": "separate",
    "default": True,
}
_CHECKS = {"database": "ok", "broker": "ok", "worker": "ok", "queue": "ok", "disk": "ok"}
_WEBHOOK: dict[str, Any] = {
    "id": f"wh_{_DIGITS}",
    "object": "webhook",
    "url": "https://hooks.example.org/tpo",
    "events": ["job.completed", "job.failed"],
    "enabled": True,
    "disabled_reason": None,
    "old_secret_until": None,
    "created_at": 1750000000,
}
_DELIVERY: dict[str, Any] = {
    "id": f"whd_{_DIGITS}",
    "object": "webhook.delivery",
    "event_id": f"evt_{_DIGITS}",
    "type": "job.completed",
    "data_id": _JOB["id"],
    "status": "pending",
    "attempt": 1,
    "created_at": 1750000009,
    "next_attempt_at": 1750000014,
    "last_error": "http_500",
}
_FILE: dict[str, Any] = {
    "id": f"file-{_DIGITS}",
    "object": "file",
    "bytes": 104,
    "created_at": 1750000000,
    "filename": "requests.jsonl",
    "purpose": "batch",
    "status": "processed",
    "expires_at": None,
}
_BATCH: dict[str, Any] = {
    "id": f"batch_{_DIGITS}",
    "object": "batch",
    "endpoint": "/v1/responses",
    "input_file_id": _FILE["id"],
    "completion_window": "24h",
    "status": "in_progress",
    "errors": None,
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1750000000,
    "in_progress_at": 1750000001,
    "expires_at": 1750086400,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 3, "completed": 1, "failed": 0},
    "usage": {
        "input_tokens": 1800,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2400,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 4200,
    },
    "metadata": {},
}
_DETAILS: dict[str, Any] = {
    "job_id": _JOB["id"],
    "status": "completed",
    "error_code": None,
    "stop_reason": None,
    "iteration": 2,
    "phase": None,
    "best_reward": 4.25,
    "reward_model": "demo",
    "reward_tokens": 1500,
    "parameters": _PARAMETERS,
    "event": None,
}
_RESPONSE: dict[str, Any] = {
    "id": f"resp_{_DIGITS}",
    "object": "response",
    "created_at": 1750000000,
    "completed_at": 1750000009,
    "status": "completed",
    "background": True,
    "model": "demo",
    "instructions": None,
    "output": [
        {
            "id": f"msg_{_DIGITS}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": _JOB["output"], "annotations": [], "logprobs": []}],
        }
    ],
    "error": None,
    "incomplete_details": None,
    "usage": _BATCH["usage"],
    "metadata": {},
    "temperature": 0.7,
    "top_p": 0.95,
    "max_output_tokens": 2048,
    "parallel_tool_calls": False,
    "tool_choice": "none",
    "tools": [],
    "truncation": "disabled",
    "store": True,
    "tpo": _DETAILS,
}
_ITEM: dict[str, Any] = {
    "id": f"msg_{_DIGITS}_0",
    "type": "message",
    "role": "user",
    "status": "completed",
    "content": [{"type": "input_text", "text": _JOB["input"]}],
}
_COMPLETION: dict[str, Any] = {
    "id": f"chatcmpl-{_DIGITS}",
    "object": "chat.completion",
    "created": 1750000000,
    "model": "demo",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": _JOB["output"], "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ],
    "usage": {"prompt_tokens": 1800, "completion_tokens": 2400, "total_tokens": 4200},
    "tpo": _DETAILS,
}
_SHORT = {"sample_size": 2, "max_iterations": 1}

STREAM = f"id: 3\nevent: job.phase\ndata: {json.dumps(_EVENT, separators=(',', ':'))}\n\n"
"""A job's event stream, shortened."""

RESPONSE_STREAM = """event: response.output_text.delta
data: {"type":"response.output_text.delta","sequence_number":9,"delta":"It arrives tomorrow before noon."}

"""
"""A response's event stream, shortened, without some fields."""

CHAT_STREAM = """data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"It arrives."}}]}

data: [DONE]

"""
"""A streamed chat completion, shortened, without some fields."""

FILE_CONTENT = '{"custom_id": "r1", "method": "POST", "url": "/v1/responses", "body": {"input": "' + _INPUT + '"}}\n'
"""Content of a batch file with one request."""

METRICS = """# HELP tpo_http_request_seconds HTTP requests and their duration until the last byte of the response
# TYPE tpo_http_request_seconds histogram
tpo_http_request_seconds_count{method="GET",route="/v1/jobs/{job_id}",status="200"} 4711.0
# HELP tpo_jobs_waiting Jobs waiting for a worker
# TYPE tpo_jobs_waiting gauge
tpo_jobs_waiting{model="demo"} 12.0
"""
"""Part of the metrics."""

EXAMPLES: dict[str, dict[str, Any]] = {
    "Job": _JOB,
    "JobPage": _page(_SUMMARY),
    "Deleted": {"id": _JOB["id"], "object": "job", "deleted": True},
    "Event": _EVENT,
    "EventList": {**_list(_EVENT), "has_more": False},
    "CandidateList": {**_list(_CANDIDATE), "has_more": False},
    "IterationList": {**_list(_ITERATION), "has_more": False},
    "Model": _MODEL,
    "ModelList": _list(_MODEL),
    "RewardModelList": _list(_REWARD_MODEL),
    "PromptSetList": _list(_PROMPT_SET),
    "Health": {"status": "ok"},
    "Ready": {"status": "ready", "checks": _CHECKS},
    "Welcome": {
        "name": "tpo",
        "version": "0.1.0",
        "docs": "/docs",
        "openapi": "/openapi.json",
        "jobs": "/v1/jobs",
        "ready": "/readyz",
    },
    "WebhookRequest": {"url": _WEBHOOK["url"], "events": _WEBHOOK["events"]},
    "WebhookUpdate": {"enabled": True},
    "Rotate": {"keep_old_seconds": 3600},
    "Webhook": _WEBHOOK,
    "WebhookWithSecret": {**_WEBHOOK, "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"},
    "WebhookPage": _page(_WEBHOOK),
    "WebhookDeleted": {"id": _WEBHOOK["id"], "object": "webhook", "deleted": True},
    "Delivery": _DELIVERY,
    "DeliveryPage": _page(_DELIVERY),
    "File": _FILE,
    "FilePage": _page(_FILE),
    "FileDeleted": {"id": _FILE["id"], "object": "file", "deleted": True},
    "BatchRequest": {"input_file_id": _FILE["id"], "endpoint": "/v1/responses", "completion_window": "24h"},
    "Batch": _BATCH,
    "BatchPage": _page(_BATCH),
    "BatchDeleted": {"id": _BATCH["id"], "object": "batch", "deleted": True},
    "ResponseRequest": {"input": _INPUT, "background": True, "tpo": _SHORT},
    "Response": _RESPONSE,
    "ResponseDeleted": {"id": _RESPONSE["id"], "object": "response", "deleted": True},
    "ItemPage": _page(_ITEM),
    "ChatRequest": {"messages": [{"role": "user", "content": _INPUT}], "tpo": _SHORT},
    "ChatCompletion": _COMPLETION,
}
"""Examples by schema name. `Submit` and `Extend` define theirs in their classes."""
