"""Input and output of an engine: tokens, seeds and times. Independent of torch and of the model."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tpo.core.state import FinishReason


@dataclass(frozen=True)
class TokenRequest:
    """One prompt, with one completion to sample for each seed. Prompt plus `max_tokens` must fit the context."""

    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    temperature: float
    top_p: float
    max_tokens: int
    under_way: bool = False
    """Whether the job has already received a completion. Such requests take priority when memory is short."""
    ended: Callable[[Sequence[int]], bool] | None = None
    """Called with the completion after each token; returns whether it is complete before its end token."""


@dataclass(frozen=True)
class Completion:
    """Generated tokens, including the end token."""

    tokens: tuple[int, ...]
    finish_reason: "FinishReason"


@dataclass
class Timings:
    """Timestamps of one request in the engine, in seconds of the monotonic clock, and counts of its work."""

    submitted: float
    started: float | None = None
    """When the request first left the queue."""
    first_token: float | None = None
    finished: float | None = None
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were already in the prefix cache."""
    preempted: int = 0
    """Samples that were preempted and restarted because memory ran out."""


@dataclass(frozen=True)
class Answer:
    """The completions of a request, in the order of its seeds."""

    completions: tuple[Completion, ...]
    timings: Timings


@dataclass(eq=False)
class Ticket:
    """A submitted request and its state in the engine."""

    request: TokenRequest
    number: int
    """Order of arrival: the youngest request has the largest number."""
    timings: Timings
    remaining: list[int] = field(default_factory=list)
    """Indices of the samples that are not started yet."""
    done: dict[int, Completion] = field(default_factory=dict)
    future: "Future[Answer]" = field(default_factory=Future)

    @property
    def is_done(self) -> bool:
        """Whether the request is answered, failed or cancelled."""
        return self.future.done()


class Engine(Protocol):
    """Generates completions for prompts. Thread-safe."""

    @property
    def capacity(self) -> int:
        """Maximum tokens of one sequence, prompt and completion together."""
        ...

    @property
    def healthy(self) -> bool:
        """False when every further request would fail."""
        ...

    def submit(self, request: TokenRequest) -> "Future[Answer]":
        """Queue a request. Cancelling the returned future drops the request between two tokens."""
        ...

    def close(self) -> None:
        """Stop the engine. Pending requests raise BackendUnavailableError."""
        ...
