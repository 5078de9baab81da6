"""Requests in the shapes of OpenAI's API, and their translation into submissions of jobs.

A parameter that would have no effect is refused by name, unless its value requests the default behaviour.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from tpo import validation_messages
from tpo.core.errors import InvalidInputError
from tpo.jobs.submission import BY_SHAPE, Submit
from tpo.wire import NonBlankText, StoredText, Wire, check_not_blank

_TEXTS = ("input_text", "output_text", "text")


def _flattened(content: Any) -> Any:
    """Join the text parts of a message's content. Raises ValueError for any other part."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            raise ValueError("must be a string or a list of text parts: other parts are not supported")
    return "".join(part["text"] for part in content)


@dataclass(frozen=True, eq=False)
class Unsupported:
    """A field that is not supported: only null and `harmless` values, which ask for the default, are accepted."""

    harmless: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.harmless]}

    def _check(self, value: Any) -> None:
        if value is not None and (isinstance(value, bool) or value not in self.harmless):
            raise ValueError("is not supported: leave it out")


Content = Annotated[StoredText | None, BeforeValidator(_flattened)]
Role = Literal["system", "developer", "user", "assistant"]


class Turn(Wire):
    """One message of a conversation."""

    role: Role
    content: Content = Field(None, validate_default=True, description="text; only a user must have one")

    @field_validator("content")
    @classmethod
    def _user_says_something(cls, content: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("role") == "user":
            if content is None:
                raise PydanticCustomError("missing", "Field required")
            check_not_blank(content)
        return content


class InputItem(Turn):
    """One message of a response's input. An output item of an earlier response can be sent back unchanged."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: None = None


class ChatMessage(Turn):
    """One message of a chat. An earlier answer can be sent back unchanged, also as the client's model dump."""

    name: Annotated[None, Unsupported(("",))] = None
    reasoning_content: str | None = Field(None, description="ignored: reasoning is not sent to the model again")
    reasoning: str | None = Field(None, description="another name of reasoning_content")
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class PlainText(Wire):
    """The only supported format: plain text."""

    type: Literal["text"] = "text"


class TextOptions(Wire):
    """Format of the output text."""

    format: PlainText | None = None
    verbosity: Annotated[None, Unsupported(("medium",))] = None


class ReasoningOptions(Wire):
    """Options of reasoning, which are not supported."""

    effort: Annotated[None, Unsupported()] = None
    summary: Annotated[None, Unsupported()] = None
    generate_summary: Annotated[None, Unsupported()] = None


class StreamOptions(Wire):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="ignored: events are never padded")


class JobRequest(Wire):
    """A request that is translated into a job."""

    names: ClassVar[Mapping[str, str]] = {}
    """Names of a submission's fields in this request."""

    model: str | None = Field(None, min_length=1, max_length=512, description="policy; default: the server's policy")
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tpo: dict[str, Any] | None = Field(
        None,
        description="fields that OpenAI's API does not have: each of a job's `parameters`, its `priority`, "
        "`deadline_seconds` and `external_id`",
    )

    tools: list[Any] | None = Field(None, max_length=0, description="tools are not supported; empty")
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="ignored, because tools are not supported")
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = Field(None, description="ignored: it does not change the answer")
    safety_identifier: str | None = Field(None, description="ignored: it does not change the answer")
    prompt_cache_key: str | None = Field(None, description="ignored: it does not change the answer")
    prompt_cache_retention: str | None = Field(None, description="ignored: it does not change the answer")
    prompt_cache_options: Annotated[None, Unsupported(({},))] = None
    moderation: Annotated[None, Unsupported()] = None
    top_logprobs: Annotated[None, Unsupported((0,))] = None

    def submission(self) -> Submit:
        """Translate the request into a submission. Raises InvalidInputError, with the field names of this request."""
        parameters = dict(self.tpo or {})
        other = {name: parameters.pop(name) for name in _OTHER_FIELDS if name in parameters}
        sampling = {name: value for name, value in self._sampling().items() if value is not None}
        for name in sorted(sampling.keys() & parameters.keys()):
            raise InvalidInputError(f"tpo.{name}: is also set outside tpo; send only one of them.", f"tpo.{name}")
        content = self._input()
        submission: dict[str, Any] = {
            "model": self.model,
            "input": content if isinstance(content, str) else _merge_system_messages(content),
            "parameters": {**parameters, **sampling},
            "metadata": self.metadata or {},
            **other,
        }
        try:
            return Submit.model_validate(submission)
        except ValidationError as error:
            raise validation_messages.invalid(error, self._renamed) from None
        except InvalidInputError as error:
            renamed = self.with_request_names(error)
            raise InvalidInputError(str(renamed).replace("under parameters", "under tpo"), renamed.param) from None

    def with_request_names(self, error: InvalidInputError) -> InvalidInputError:
        """Return an error of the submission with the field names of this request."""
        if not error.param:
            return error
        name = self._renamed(error.param)
        return type(error)(str(error).replace(error.param, name), name)

    def _input(self) -> str | list[Turn]:
        raise NotImplementedError

    def _sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_p": self.top_p}

    def _renamed(self, field: str) -> str:
        head, dot, rest = field.partition(".")
        if head == "parameters":
            return f"tpo.{rest}" if rest in (self.tpo or {}) else self.names.get(field, f"tpo{dot}{rest}")
        top = head.partition("[")[0]
        return f"tpo.{field}" if top in _OTHER_FIELDS else field.replace(top, self.names.get(top, top), 1)


class ResponseRequest(JobRequest):
    """The body of `POST /v1/responses`."""

    names = {  # noqa: RUF012 - as annotated above
        "parameters.temperature": "temperature",
        "parameters.top_p": "top_p",
        "parameters.max_tokens": "max_output_tokens",
    }

    input: Annotated[
        Annotated[NonBlankText, Tag("text")] | Annotated[list[InputItem], Field(fail_fast=True), Tag("messages")],
        BY_SHAPE,
    ] = Field(description="a prompt, or messages of which the last is the user's")
    instructions: StoredText | None = Field(None, description="system message before the input")
    max_output_tokens: int | None = Field(None, description="maximum length of each sample, in tokens")
    background: bool | None = Field(None, description="if not true, the request waits until the job ends")
    store: Literal[True] | None = Field(None, description="always true: every job is stored")
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Any] | None = Field(None, max_length=0)
    reasoning: ReasoningOptions | None = None
    previous_response_id: Annotated[None, Unsupported()] = None
    conversation: Annotated[None, Unsupported()] = None
    prompt: Annotated[None, Unsupported()] = None
    context_management: Annotated[None, Unsupported(([],))] = None
    max_tool_calls: int | None = Field(None, description="ignored, because tools are not supported")
    access_programs: Annotated[None, Unsupported(([],))] = None
    background_options: Annotated[None, Unsupported(({},))] = None
    image: Annotated[None, Unsupported(({},))] = None

    def _input(self) -> str | list[Turn]:
        if self.instructions is None or not self.instructions.strip():
            return self.input if isinstance(self.input, str) else list(self.input)
        turns = [Turn(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [Turn(role="system", content=self.instructions), *turns]

    def _sampling(self) -> dict[str, Any]:
        return {**super()._sampling(), "max_tokens": self.max_output_tokens}


class ChatRequest(JobRequest):
    """The body of `POST /v1/chat/completions`."""

    names = {  # noqa: RUF012 - as annotated above
        "input": "messages",
        "parameters.temperature": "temperature",
        "parameters.top_p": "top_p",
        "parameters.max_tokens": "max_completion_tokens",
        "parameters.seed": "seed",
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_completion_tokens: int | None = Field(None, description="maximum length of each sample, in tokens")
    max_tokens: int | None = Field(None, description="older name of max_completion_tokens")
    seed: int | None = None
    n: Literal[1] | None = None
    response_format: PlainText | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    store: bool | None = Field(None, description="ignored: every job is stored, for as long as the server keeps jobs")
    stop: Annotated[None, Unsupported(([], ""))] = Field(
        None, description="not supported; `tpo.stop` ends the first samples"
    )
    logit_bias: Annotated[None, Unsupported(({},))] = None
    modalities: Annotated[None, Unsupported(([], ["text"]))] = None
    audio: Annotated[None, Unsupported()] = None
    prediction: Annotated[None, Unsupported()] = None
    reasoning_effort: Annotated[None, Unsupported()] = None
    verbosity: Annotated[None, Unsupported(("medium",))] = None
    functions: Annotated[None, Unsupported(([],))] = None
    function_call: Annotated[None, Unsupported(("auto", "none"))] = None
    web_search_options: Annotated[None, Unsupported()] = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: send only one of them")
        return self

    def _input(self) -> str | list[Turn]:
        return list(self.messages)

    def _sampling(self) -> dict[str, Any]:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return {**super()._sampling(), "max_tokens": limit, "seed": self.seed}


def _merge_system_messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Leave out blank messages, and merge leading system and developer messages into one.

    Chat templates allow only one system message, at the start.
    """
    messages = [
        {"role": turn.role.replace("developer", "system"), "content": turn.content}
        for turn in turns
        if turn.content and turn.content.strip()
    ]
    leading = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if leading < 2:
        return messages
    merged = "\n\n".join(message["content"] for message in messages[:leading])
    return [{"role": "system", "content": merged}, *messages[leading:]]


_OTHER_FIELDS = tuple(sorted(set(Submit.model_fields) - {"model", "input", "parameters", "metadata"}))
"""Fields of a submission that are not parameters and have no name in OpenAI's API."""
