"""What goes into an engine and comes out of it: tokens, seeds, times. No torch, no model."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tpo.core.state import FinishReason


@dataclass(frozen=True)
class TokenRequest:
    """One prompt, and a completion to be sampled for each seed. Prompt and `max_tokens` fit the context together."""

    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    temperature: float
    top_p: float
    max_tokens: int
    under_way: bool = False
    """Whether the job has had an answer before: where memory is short, such requests go first."""
    ended: Callable[[Sequence[int]], bool] | None = None
    """Looks at a completion after each token: whether it is whole before its end token."""


@dataclass(frozen=True)
class Completion:
    """Generated tokens, the end token counted."""

    tokens: tuple[int, ...]
    finish_reason: "FinishReason"


@dataclass
class Timings:
    """One request's way through the engine, in seconds of the monotonic clock, and its share of the work."""

    submitted: float
    started: float | None = None
    """When it first left the queue."""
    first_token: float | None = None
    finished: float | None = None
    reused_tokens: int = 0
    """Prompt tokens whose keys and values an earlier request had left."""
    preempted: int = 0
    """Samples that had to begin again because memory ran out."""


@dataclass(frozen=True)
class Answer:
    """Completions in the order of the seeds."""

    completions: tuple[Completion, ...]
    timings: Timings


@dataclass(eq=False)
class Ticket:
    """A request on its way."""

    request: TokenRequest
    number: int
    """Counts up with arrival: the largest is the youngest."""
    timings: Timings
    todo: list[int] = field(default_factory=list)
    """Samples that nobody writes yet."""
    done: dict[int, Completion] = field(default_factory=dict)
    future: "Future[Answer]" = field(default_factory=Future)

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()


class Engine(Protocol):
    """What turns tokens into tokens for many threads at once."""

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may have, prompt and answer together."""
        ...

    @property
    def healthy(self) -> bool:
        """False when every further request would fail."""
        ...

    def submit(self, request: TokenRequest) -> "Future[Answer]":
        """An answer to come; cancelling the future drops the request between two tokens."""
        ...

    def close(self) -> None:
        """Stop; requests that wait raise BackendUnavailableError."""
        ...
