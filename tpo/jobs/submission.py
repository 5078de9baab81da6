"""Submissions: the fields of a request for a job, and the state that it describes. Used by the API and batches.

Requests are strict: nothing is guessed, and unknown fields are rejected by name.
"""

import secrets
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from tpo.core import prompts
from tpo.core.errors import InvalidInputError, UnknownModelError
from tpo.core.state import EarlyStop, Message, Params, State
from tpo.settings import Settings
from tpo.wire import NonBlankText, StoredText, Wire

MAX_DEADLINE_SECONDS = 366 * 24 * 3600
MIN_PRIORITY, MAX_PRIORITY = -100, 100
MAX_METADATA = 16


class InputMessage(Message):
    """One turn of a conversation."""

    content: NonBlankText


def _ends_with_user(messages: list[InputMessage]) -> list[InputMessage]:
    if messages[-1].role != "user":
        raise ValueError("the last message must be the user's: that is what is answered")
    return messages


def _kind_of_input(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    return "messages" if isinstance(value, list) else None


BY_SHAPE = Discriminator(
    _kind_of_input,
    custom_error_type="input_type",
    custom_error_message="must be a string, or a list of messages with role and content",
)
"""Discriminates two shapes of input by tag: "text" or "messages"."""

Input = Annotated[
    Annotated[NonBlankText, Tag("text")]
    | Annotated[
        list[InputMessage],
        Field(min_length=1, max_length=1000, fail_fast=True),
        AfterValidator(_ends_with_user),
        Tag("messages"),
    ],
    BY_SHAPE,
]

MetadataKey = Annotated[StoredText, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[StoredText, StringConstraints(max_length=512)]
Metadata = dict[MetadataKey, MetadataValue]


class SubmitParameters(Params):
    """Parameters of an optimization. Omitted ones have the paper's values."""

    model_config = ConfigDict(strict=True)

    seed: int = Field(
        default_factory=lambda: secrets.randbits(53),
        ge=0,
        le=2**63 - 1,
        description="seed from which the seed of every sample is derived; random and recorded if omitted",
    )
    reward_model: str | None = Field(None, min_length=1, max_length=512, description="default: the server's setting")
    prompt_set: str | None = Field(None, min_length=1, max_length=64, description="default: the server's setting")


class Submit(Wire):
    """A job to submit."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": "My lamp is now broken. Can I get a quick refund?"},
                {
                    "model": "demo",
                    "input": [{"role": "user", "content": "My lamp is now broken. Can I get a quick refund?"}],
                    "parameters": {
                        "mode": "tpo",
                        "sample_size": 4,
                        "max_iterations": 2,
                        "seed": 7,
                        "max_output_tokens": 20_000,
                        "early_stop": {"patience": 1, "min_gain": 0.1},
                    },
                    "priority": 10,
                    "metadata": {"ticket": "4711"},
                    "external_id": "ticket-4711",
                    "deadline_seconds": 600,
                },
            ]
        }
    )

    model: str | None = Field(
        None, min_length=1, max_length=512, description="the policy; default: the server's setting"
    )
    input: Input = Field(description="the prompt: a string, or messages of which the last is the user's")
    parameters: SubmitParameters = Field(default_factory=SubmitParameters)
    priority: int = Field(
        0, ge=MIN_PRIORITY, le=MAX_PRIORITY, description="the higher goes first; a long wait outweighs it in time"
    )
    metadata: Metadata = Field(default_factory=dict, max_length=MAX_METADATA)
    external_id: Annotated[StoredText, StringConstraints(min_length=1, max_length=512)] | None = Field(
        None, description="your own unique name for the job: a repeated request returns the first job"
    )
    deadline_seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_SECONDS,
        description="seconds after which the job ends with its best candidate so far",
    )

    @model_validator(mode="before")
    @classmethod
    def _check_places(cls, body: Any) -> Any:
        """Raise InvalidInputError for a known field in the wrong object, with the place where it belongs."""
        # Not a ValueError: pydantic would report it for the whole body, without the field's name.
        if isinstance(body, dict):
            parameters = body.get("parameters")
            _check_place("", body, cls.model_fields)
            _check_place("parameters.", parameters if isinstance(parameters, dict) else {}, _PLACES["parameters"])
        return body


_PLACES: dict[str, Iterable[str]] = {
    "parameters": SubmitParameters.model_fields,
    "parameters.early_stop": EarlyStop.model_fields,
    "the body, next to input": Submit.model_fields,
}
"""Where each field of a submission belongs."""


def _check_place(prefix: str, given: dict[str, Any], known: Iterable[str]) -> None:
    for name in given:
        place = next((place for place, names in _PLACES.items() if name in names), None)
        if name not in known and place is not None:
            preposition = "in" if place.startswith("the ") else "under"
            raise InvalidInputError(f"{prefix}{name}: belongs {preposition} {place}", f"{prefix}{name}")


UNKNOWN_POLICY = "No worker serves the policy {!r}. Available: {}."


class Served(NamedTuple):
    """A policy and a reward model that one worker serves."""

    model: str
    reward_model: str


def resolve_models(body: Submit, settings: Settings, workers: Callable[[], Iterable[Served]]) -> Served:
    """Return the policy and reward model of a job. `workers` is called only if they are not those of the settings.

    Raises UnknownModelError if no worker serves them.
    """
    own = Served(settings.policy, settings.reward_model)
    wanted = Served(body.model or own.model, body.parameters.reward_model or own.reward_model)
    if wanted == own:
        return own
    known = {own, *workers()}
    if wanted in known:
        return wanted
    available = sorted(s.reward_model for s in known if s.model == wanted.model)
    if not available:
        models = ", ".join(sorted({s.model for s in known}))
        raise UnknownModelError(UNKNOWN_POLICY.format(wanted.model, models), "model")
    raise UnknownModelError(
        f"No worker serves the reward model {wanted.reward_model!r} with the policy {wanted.model!r}. Available: "
        f"{', '.join(available)}.",
        "parameters.reward_model",
    )


def to_state(body: Submit, model: str, settings: Settings) -> State:
    """Return the state of the requested optimization before its first step. Raises InvalidInputError."""
    for name, limit in (("sample_size", settings.max_sample_size), ("max_iterations", settings.max_iterations)):
        if getattr(body.parameters, name) > limit:
            raise InvalidInputError(f"parameters.{name}: this server allows at most {limit}.", f"parameters.{name}")
    messages = (
        (Message(role="user", content=body.input),)
        if isinstance(body.input, str)
        else tuple(Message(role=m.role, content=m.content) for m in body.input)
    )
    if (length := sum(len(m.content) for m in messages)) > settings.max_input_characters:
        raise InvalidInputError(
            f"input: has {length} characters; this server allows at most {settings.max_input_characters}.", "input"
        )
    try:
        prompt_set = prompts.load(body.parameters.prompt_set or settings.prompt_set_of(model))
    except InvalidInputError as error:
        raise InvalidInputError(f"parameters.prompt_set: {error}", "parameters.prompt_set") from error
    given = body.parameters.model_dump(include=set(Params.model_fields))
    defaults = {name: v for name, v in settings.stopping.items() if name not in body.parameters.model_fields_set}
    params = Params.model_validate({**given, **defaults})
    return State(input=messages, params=params, prompts=prompt_set)
