"""Requests as OpenAI's clients write them, and the submission that each one means.

A parameter that would have no effect is refused by its name, unless its value asks for what is done anyway.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag, ValidationError, model_validator

from tpo import validation_messages
from tpo.core.errors import InvalidInputError
from tpo.jobs.submission import BY_SHAPE, Submit
from tpo.wire import SaidText, Wire

_TEXTS = ("input_text", "output_text", "text")


def _flattened(content: Any) -> Any:
    """The text of a message whose content is given in parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            raise ValueError("must be a string, or a list of parts that are texts: nothing else can be read")
    return "".join(part["text"] for part in content)


Content = Annotated[SaidText, BeforeValidator(_flattened)]
Role = Literal["system", "developer", "user", "assistant"]


class Turn(Wire):
    """One message."""

    role: Role
    content: Content


class InputItem(Turn):
    """One message of a response's input. An item of an earlier response's output can be given back as it is."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: None = None


class ChatMessage(Turn):
    """One message of a chat. An earlier answer can be given back as it is, dumped by the client or not."""

    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class PlainText(Wire):
    """The one format that there is."""

    type: Literal["text"] = "text"


class TextOptions(Wire):
    """How the text is formatted."""

    format: PlainText | None = None


class StreamOptions(Wire):
    """What a stream holds beside the text."""

    include_usage: bool = False


class JobRequest(Wire):
    """A request that means a job."""

    names: ClassVar[Mapping[str, str]] = {}
    """Fields of a submission by the names that they have here."""

    model: str | None = Field(None, min_length=1, max_length=512, description="default: the server's setting")
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tpo: dict[str, Any] | None = Field(
        None,
        description="what OpenAI's API does not know: each of a job's `parameters`, its `priority`, `deadline_seconds` "
        "and `external_id`",
    )

    store: Literal[True] | None = Field(None, description="every job is stored")
    tools: list[Any] | None = Field(None, max_length=0, description="there are none")
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="without tools it says nothing")
    service_tier: Literal["auto", "default"] | None = None

    def submission(self) -> Submit:
        """The job that is asked for. Raises InvalidInputError, by the names of this request."""
        own = dict(self.tpo or {})
        beside = {name: own.pop(name) for name in _BESIDE if name in own}
        given = {name: value for name, value in self._sampling().items() if value is not None}
        for name in sorted(given.keys() & own.keys()):
            raise InvalidInputError(f"tpo.{name}: stands beside tpo too; send one of them.", f"tpo.{name}")
        said = self._said()
        wanted: dict[str, Any] = {
            "model": self.model,
            "input": said if isinstance(said, str) else _one_system_message(said),
            "parameters": {**own, **given},
            "metadata": self.metadata or {},
            **beside,
        }
        try:
            return Submit.model_validate(wanted)
        except ValidationError as error:
            raise validation_messages.invalid(error, self._renamed) from None

    def as_sent(self, error: InvalidInputError) -> InvalidInputError:
        """An error about the submission, told by the names of this request."""
        if not error.param:
            return error
        name = self._renamed(error.param)
        return type(error)(str(error).replace(error.param, name), name)

    def _said(self) -> str | list[Turn]:
        raise NotImplementedError

    def _sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_p": self.top_p}

    def _renamed(self, field: str) -> str:
        head, dot, rest = field.partition(".")
        if head == "parameters":
            return f"tpo.{rest}" if rest in (self.tpo or {}) else self.names.get(field, f"tpo{dot}{rest}")
        top = head.partition("[")[0]
        return f"tpo.{field}" if top in _BESIDE else field.replace(top, self.names.get(top, top), 1)


class ResponseRequest(JobRequest):
    """`POST /v1/responses`."""

    names = {  # noqa: RUF012 - as annotated above
        "parameters.temperature": "temperature",
        "parameters.top_p": "top_p",
        "parameters.max_tokens": "max_output_tokens",
    }

    input: Annotated[Annotated[SaidText, Tag("text")] | Annotated[list[InputItem], Tag("messages")], BY_SHAPE] = Field(
        description="a string, or messages of which the last is the user's"
    )
    instructions: SaidText | None = Field(None, description="the system's message, before the input")
    max_output_tokens: int | None = Field(None, description="of each sampled response")
    background: bool | None = Field(None, description="where it is not true, the answer waits for the job's end")
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Any] | None = Field(None, max_length=0)

    def _said(self) -> str | list[Turn]:
        if self.instructions is None:
            return self.input if isinstance(self.input, str) else list(self.input)
        turns = [Turn(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [Turn(role="system", content=self.instructions), *turns]

    def _sampling(self) -> dict[str, Any]:
        return {**super()._sampling(), "max_tokens": self.max_output_tokens}


class ChatRequest(JobRequest):
    """`POST /v1/chat/completions`."""

    names = {  # noqa: RUF012 - as annotated above
        "input": "messages",
        "parameters.temperature": "temperature",
        "parameters.top_p": "top_p",
        "parameters.max_tokens": "max_completion_tokens",
        "parameters.seed": "seed",
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, description="of each sampled response")
    max_tokens: int | None = Field(None, description="the older name of max_completion_tokens")
    seed: int | None = None
    n: Literal[1] | None = None
    response_format: PlainText | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: send one of them")
        return self

    def _said(self) -> str | list[Turn]:
        return list(self.messages)

    def _sampling(self) -> dict[str, Any]:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return {**super()._sampling(), "max_tokens": limit, "seed": self.seed}


def _one_system_message(turns: list[Turn]) -> list[dict[str, str]]:
    """Chat templates know the role of the system alone, once, and at the head."""
    said = [{"role": t.role.replace("developer", "system"), "content": t.content} for t in turns]
    head = next((at for at, turn in enumerate(said) if turn["role"] != "system"), len(said))
    if head < 2:
        return said
    return [{"role": "system", "content": "\n\n".join(turn["content"] for turn in said[:head])}, *said[head:]]


_BESIDE = tuple(sorted(set(Submit.model_fields) - {"model", "input", "parameters", "metadata"}))
"""What stands beside a submission's parameters, and has no name in OpenAI's API."""
