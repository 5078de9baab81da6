"""Input and output of an engine: tokens, seeds and metrics. Independent of torch and of the model."""

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
    is_continuation: bool = False
    """Whether the job has received a completion before. Continuations are admitted first and preempted last."""
    stop_check: Callable[[Sequence[int]], bool] | None = None
    """Called with the completion after each token; returns whether it is complete before its end token."""


@dataclass(frozen=True)
class Completion:
    """Generated tokens, including the end token."""

    tokens: tuple[int, ...]
    finish_reason: "FinishReason"


@dataclass
class RequestMetrics:
    """Timestamps of one request in the engine, in seconds of the monotonic clock, and counts of its work."""

    submitted_at: float
    started_at: float | None = None
    """Start of the first prefill."""
    first_token_at: float | None = None
    finished_at: float | None = None
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were already in the prefix cache."""
    preemptions: int = 0
    """Number of times that samples were preempted and restarted because memory ran out."""


@dataclass(frozen=True)
class RequestOutput:
    """The completions of a request, in the order of its seeds."""

    completions: tuple[Completion, ...]
    metrics: RequestMetrics


@dataclass(eq=False)
class EngineRequest:
    """A submitted request and its state in the engine."""

    inputs: TokenRequest
    number: int
    """Order of arrival: the youngest request has the largest number."""
    metrics: RequestMetrics
    pending_samples: list[int] = field(default_factory=list)
    """Indices of the samples that have not been started, or were preempted."""
    completions: dict[int, Completion] = field(default_factory=dict)
    """Finished completions, by index of their sample."""
    future: "Future[RequestOutput]" = field(default_factory=Future)

    @property
    def is_finished(self) -> bool:
        """True when the request has its output, has failed or was cancelled."""
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

    def submit(self, request: TokenRequest) -> "Future[RequestOutput]":
        """Queue a request. Cancelling the returned future aborts the request between two tokens."""
        ...

    def close(self) -> None:
        """Stop the engine. Pending requests raise BackendUnavailableError."""
        ...
