"""Fields of OpenAI's requests that clients send without asking for anything: null, defaults and empty values."""

from typing import Any

import pytest
from openai.types.batch_create_params import BatchCreateParams
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.chat.chat_completion_system_message_param import ChatCompletionSystemMessageParam
from openai.types.chat.chat_completion_user_message_param import ChatCompletionUserMessageParam
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from tpo.jobs.submission import Submit, SubmitParameters
from tpo.openai.batches import BatchRequest
from tpo.openai.requests import ChatRequest, JobRequest, ResponseRequest

USER = {"role": "user", "content": "Hi"}
CHAT: dict[str, Any] = {"messages": [USER]}
RESPONSE: dict[str, Any] = {"input": "Hi"}
BATCH = {"input_file_id": "file-1", "endpoint": "/v1/responses", "completion_window": "24h"}


def fields(params: Any, required: dict[str, Any]) -> list[str]:
    """Return the fields that the official client may leave out."""
    names = {name for cls in params.__mro__ for name in getattr(cls, "__annotations__", {})}
    return sorted((names | set(params.__annotations__)) - set(required))


DEFAULTS: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "include": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"], []),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0, 0.0),
    "prompt_cache_key": ("", "key"),
    "reasoning": ({}, {"effort": None, "summary": None}),
    "response_format": ({"type": "text"},),
    "safety_identifier": ("", "someone"),
    "service_tier": ("auto", "default"),
    "stop": ([], ""),
    "store": (True,),
    "stream": (False,),
    "stream_options": ({}, {"include_obfuscation": True}),
    "temperature": (1, 1.0),
    "text": ({}, {"format": {"type": "text"}, "verbosity": "medium"}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1, 1.0),
    "truncation": ("disabled",),
    "user": ("", "someone"),
    "verbosity": ("medium",),
}
"""Values that ask for what happens anyway, by the name of the field."""


@pytest.mark.parametrize(
    ("request_type", "body", "field"),
    [
        *((ChatRequest, CHAT, name) for name in fields(CompletionCreateParamsNonStreaming, CHAT)),
        *((ResponseRequest, RESPONSE, name) for name in fields(ResponseCreateParamsNonStreaming, RESPONSE)),
    ],
)
def test_every_field_accepts_null_and_defaults(
    request_type: type[JobRequest], body: dict[str, Any], field: str
) -> None:
    plain = request_type.model_validate(body).submission().model_dump(exclude={"parameters": {"seed"}})
    values = [None, *DEFAULTS.get(field, ()), *([False] if field == "store" and request_type is ChatRequest else [])]
    for value in values:
        submission = request_type.model_validate({**body, field: value}).submission()
        if field not in ("temperature", "top_p"):
            assert submission.model_dump(exclude={"parameters": {"seed"}}) == plain


@pytest.mark.parametrize(
    ("request_type", "body", "field", "value"),
    [
        (ChatRequest, CHAT, "stop", ["END"]),
        (ChatRequest, CHAT, "logit_bias", {"1": 1}),
        (ChatRequest, CHAT, "top_logprobs", 2),
        (ChatRequest, CHAT, "top_logprobs", False),
        (ChatRequest, CHAT, "reasoning_effort", "high"),
        (ChatRequest, CHAT, "modalities", ["audio"]),
        (ChatRequest, CHAT, "web_search_options", {}),
        (ResponseRequest, RESPONSE, "store", False),
        (ResponseRequest, RESPONSE, "previous_response_id", "resp_1"),
        (ResponseRequest, RESPONSE, "reasoning", {"effort": "high"}),
    ],
)
def test_value_that_would_have_no_effect_is_refused(
    request_type: type[JobRequest], body: dict[str, Any], field: str, value: Any
) -> None:
    with pytest.raises(ValidationError) as caught:
        request_type.model_validate({**body, field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (ChatCompletionUserMessageParam, USER),
        (ChatCompletionSystemMessageParam, {"role": "system", "content": "Be kind."}),
        (ChatCompletionAssistantMessageParam, {"role": "assistant", "content": "Hello"}),
    ],
)
def test_every_field_of_a_message_accepts_null(params: Any, message: dict[str, Any]) -> None:
    for field in fields(params, message):
        ChatRequest.model_validate({"messages": [{**message, field: None}, USER]}).submission()
    variants: tuple[dict[str, Any], ...] = (
        {"name": ""},
        {"annotations": []},
        {"tool_calls": []},
        {"reasoning_content": "Hm."},
    )
    for more in variants:
        ChatRequest.model_validate({"messages": [{**message, **more}, USER]}).submission()


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
@pytest.mark.parametrize("content", [None, "", " ", []])
def test_blank_message_of_others_is_left_out(role: str, content: Any) -> None:
    chat = ChatRequest.model_validate({"messages": [{"role": role, "content": content}, USER]}).submission()
    response = ResponseRequest.model_validate({"input": [{"role": role, "content": content}, USER]}).submission()
    for submission in (chat, response):
        assert [message.role for message in submission.input if not isinstance(message, str)] == ["user"]


@pytest.mark.parametrize("content", [None, "", " \n", []])
def test_blank_message_of_a_user_is_refused(content: Any) -> None:
    for request_type, field in ((ChatRequest, "messages"), (ResponseRequest, "input")):
        with pytest.raises(ValidationError):
            request_type.model_validate({field: [{"role": "user", "content": content}]})


def test_blank_instructions_are_left_out() -> None:
    assert ResponseRequest.model_validate({**RESPONSE, "instructions": " "}).submission().input == "Hi"


def test_batch_accepts_null_metadata_and_expiry() -> None:
    for field in fields(BatchCreateParams, BATCH):
        BatchRequest.model_validate({**BATCH, field: None})


def test_own_request_accepts_its_documented_defaults() -> None:
    for name, info in Submit.model_fields.items():
        if info.default is not PydanticUndefined:
            Submit.model_validate({**RESPONSE, name: info.default})
    for name, info in SubmitParameters.model_fields.items():
        if info.default is not PydanticUndefined:
            Submit.model_validate({**RESPONSE, "parameters": {name: info.default}})
    Submit.model_validate({**RESPONSE, "parameters": {}, "metadata": {}})
