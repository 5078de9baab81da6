"""Reward engine: one thread scores tokenized conversations of all jobs in batches, sorted by length.

Precision: in float32, a score varies by about 1e-5 with the rest of its batch. In lower precision, the head still runs
in float32 and batches have fixed shapes: rows are padded to whole blocks of tokens, and batches to a fixed number of
rows. The shape of a conversation's computation then does not depend on its batch, so its score is reproducible.
"""

import logging
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from tpo.backends.futures import fail, succeed
from tpo.backends.local.engine import is_out_of_memory
from tpo.backends.local.watchdog import Watchdog
from tpo.core.errors import BackendUnavailableError

BATCH_TOKENS = 8192
"""Maximum tokens of a batch, including padding. A longer conversation is scored in a batch by itself."""
CPU_TOKENS = 512
"""Maximum tokens of a batch on a CPU. Larger batches exceed its caches and are slower than single conversations."""
FIXED_TOKENS = 4096
"""Maximum tokens of a batch with fixed shapes, where a partly filled batch costs as much as a full one."""
_BLOCK = 128

_log = logging.getLogger(__name__)

Scores = tuple[float, ...]
Item = tuple["_Ticket", int]


@dataclass(eq=False)
class _Ticket:
    """A submitted request: its conversations and the scores known so far."""

    conversations: list[list[int]]
    number: int
    """Order of arrival."""
    future: "Future[Scores]" = field(default_factory=Future)
    scores: dict[int, float] = field(default_factory=dict)


class RewardEngine:
    """Scores conversations with a sequence classifier of transformers with one label. Thread-safe."""

    def __init__(self, network: Any, vocabulary: int) -> None:
        self._network = network
        self._vocabulary = vocabulary
        self._fixed_shapes = network.dtype != torch.float32
        self._budget = CPU_TOKENS if network.device.type == "cpu" else BATCH_TOKENS
        if self._fixed_shapes:
            _use_float32_head(network)
        self._numbers = count()
        self._changed = threading.Condition()
        self._waiting: deque[_Ticket] = deque()
        self._ended: str | None = None
        self._watchdog = Watchdog()
        self._thread = threading.Thread(target=self._run, name="reward", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False when the thread has ended or is stuck."""
        return self._ended is None and not self._watchdog.stuck

    def submit(self, conversations: list[list[int]]) -> "Future[Scores]":
        """Queue conversations and return the future of their raw logits, one for each conversation.

        Raises BackendUnavailableError if the thread has ended.
        """
        ticket = _Ticket(conversations, next(self._numbers))
        if not conversations:
            succeed(ticket.future, ())
            return ticket.future
        with self._changed:
            if self._ended:
                raise BackendUnavailableError(self._ended)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket.future

    def close(self) -> None:
        """Stop the thread after the current batch."""
        self._end("The reward model was closed.")
        self._thread.join()

    def _run(self) -> None:
        items: list[Item] = []
        batch: list[Item] = []
        try:
            with torch.inference_mode():
                while self._collect(items):
                    # Requests that arrive during a batch can share the next one.
                    batch = self._next_batch(items)
                    self._answer(batch)
        except BaseException as error:
            _log.critical("the reward model's loop has died", exc_info=error)
            self._end(f"The reward model's loop has died and this process must be restarted: {error!r}")
        finally:
            for ticket, _ in (*batch, *items):
                fail(ticket.future, BackendUnavailableError(self._ended))

    def _collect(self, items: list[Item]) -> bool:
        """Wait for work and add new requests to the items, sorted by length. Return False when the loop must end."""
        self._watchdog.rest()
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._waiting or items)
            arrived = list(self._waiting)
            self._waiting.clear()
        items += [(ticket, i) for ticket in arrived for i in range(len(ticket.conversations))]
        items[:] = [item for item in items if not item[0].future.done()]
        items.sort(key=_length)
        return self._ended is None

    def _next_batch(self, items: list[Item]) -> list[Item]:
        """Remove the next batch from the items: the oldest item and its neighbours in length, within the budget."""
        if not items:
            return []
        oldest = min(range(len(items)), key=lambda i: items[i][0].number)
        first = last = oldest
        while True:
            wider = [(a, b) for a, b in ((first - 1, last), (first, last + 1)) if a >= 0 and b < len(items)]
            fitting = [(a, b) for a, b in wider if self._fits_batch(_length(items[a]), _length(items[b]), b - a + 1)]
            if not fitting:
                break
            first, last = fitting[0]
        batch = items[first : last + 1]
        del items[first : last + 1]
        return batch

    def _fits_batch(self, shortest: int, longest: int, count: int) -> bool:
        """Return whether that many conversations of these lengths may form one batch."""
        return count <= self._max_rows(longest) and (
            not self._fixed_shapes or _padded_width(shortest) == _padded_width(longest)
        )

    def _max_rows(self, length: int) -> int:
        """Return the maximum number of rows of a batch whose longest conversation has this length."""
        if self._fixed_shapes:
            return max(1, FIXED_TOKENS // _padded_width(length))
        return max(1, self._budget // length)

    def _end(self, why: str) -> None:
        """Mark the engine as ended and fail the requests that the loop has not taken yet."""
        with self._changed:
            self._ended = self._ended or why
            while self._waiting:
                fail(self._waiting.popleft().future, BackendUnavailableError(self._ended))
            self._changed.notify()

    def _answer(self, batch: list[Item]) -> None:
        """Score a batch and answer each request whose last score is now known.

        A batch that fails is split in halves, so that only the faulty conversation fails.
        """
        if not batch:
            return
        try:
            scores = self.scores([ticket.conversations[i] for ticket, i in batch])
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            if len(batch) > 1:
                _release(self._network)
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self._answer(half)
                return
            what = "ran out of memory" if is_out_of_memory(error) else f"failed: {error!r}"
            fail(batch[0][0].future, BackendUnavailableError(f"The reward model {what}."))
            return
        for (ticket, i), score in zip(batch, scores, strict=True):
            ticket.scores[i] = score
            if len(ticket.scores) == len(ticket.conversations):
                succeed(ticket.future, tuple(ticket.scores[k] for k in range(len(ticket.scores))))

    def scores(self, conversations: list[list[int]]) -> list[float]:
        """Return the raw logits of one padded batch.

        transformers reads the score at the last token that is not the padding token. If a conversation ended with that
        token, it would read one token too early, so the padding token here is one that no conversation contains.
        """
        self._watchdog.beat()
        used = {token for c in conversations for token in c}
        padding = next((t for t in range(self._vocabulary) if t not in used), -1)
        if padding < 0 and len(conversations) > 1:
            return [self.scores([c])[0] for c in conversations]
        config = self._network.config.get_text_config()
        config.pad_token_id = padding
        width, rows = max(map(len, conversations)), conversations
        if self._fixed_shapes and padding >= 0:
            width = _padded_width(width)
            rows = conversations + conversations[:1] * (self._max_rows(width) - len(conversations))
        device = self._network.device
        ids = torch.tensor([c + [padding] * (width - len(c)) for c in rows], device=device)
        lengths = torch.tensor([len(c) for c in rows], device=device)
        positions = torch.arange(width, device=device)
        mask = (positions < lengths.unsqueeze(1)).long()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        window = getattr(config, "max_position_embeddings", None) or width
        if width > window:  # Only padding lies beyond the window, where learned positions end.
            inputs["position_ids"] = positions.clamp(max=window - 1).expand(len(rows), -1)
        logits: Tensor = self._network(**inputs).logits
        return [float(value) for value in logits[: len(conversations), 0].float().tolist()]


def _length(item: Item) -> int:
    """Return the number of tokens of an item's conversation."""
    return len(item[0].conversations[item[1]])


def _padded_width(length: int) -> int:
    """Return the fixed width of a row.

    A row always has some padding. Without any, transformers omits the mask, and torch chooses another kernel whose
    last bits differ.
    """
    return (length // _BLOCK + 1) * _BLOCK


def _use_float32_head(network: Any) -> None:
    """Make the head compute in float32, whatever the dtype of the layers below."""
    head = getattr(network, "score", None)
    if isinstance(head, torch.nn.Linear):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _release(network: Any) -> None:
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
