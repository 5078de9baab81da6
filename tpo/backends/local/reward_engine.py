"""Conversations of all jobs, as tokens, sorted by length and scored in batches by one thread. No port, no tokenizer.

How exact a score is: in float32, moving with its company by some 1e-5. In less, the head is float32 all the same, and
batches have fixed shapes: rows are filled up to whole blocks of tokens, batches to a fixed number of rows. So a
conversation is multiplied in one shape whoever is beside it, and has one score.
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
"""Padding counted; a longer conversation is scored alone."""
CPU_TOKENS = 512
"""The same on a CPU, where larger batches leave its caches and are slower than one conversation after the other."""
FIXED_TOKENS = 4096
"""The same where shapes are fixed: batches that are not full cost as much as those that are."""
_BLOCK = 128

_log = logging.getLogger(__name__)

Scores = tuple[float, ...]
Item = tuple["_Ticket", int]


@dataclass(eq=False)
class _Ticket:
    """Conversations of one request on their way."""

    conversations: list[list[int]]
    number: int
    """Counts up with arrival."""
    future: "Future[Scores]" = field(default_factory=Future)
    scores: dict[int, float] = field(default_factory=dict)


class RewardEngine:
    """A sequence classifier of transformers with one label, shared by many threads."""

    def __init__(self, network: Any, vocabulary: int) -> None:
        self._network = network
        self._vocabulary = vocabulary
        self._fixed = network.dtype != torch.float32
        self._budget = CPU_TOKENS if network.device.type == "cpu" else BATCH_TOKENS
        if self._fixed:
            _exact_head(network)
        self._count = count()
        self._changed = threading.Condition()
        self._waiting: deque[_Ticket] = deque()
        self._ended: str | None = None
        self._pulse = Watchdog()
        self._thread = threading.Thread(target=self._run, name="reward", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False when the thread has ended, or is stuck."""
        return self._ended is None and not self._pulse.stuck

    def submit(self, conversations: list[list[int]]) -> "Future[Scores]":
        """Raw logits to come, one for each conversation. Raises BackendUnavailableError when the thread has ended."""
        ticket = _Ticket(conversations, next(self._count))
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
        """Stop the thread after the batch that runs."""
        self._end("The reward model was closed.")
        self._thread.join()

    def _run(self) -> None:
        items: list[Item] = []
        batch: list[Item] = []
        try:
            with torch.inference_mode():
                while self._collect(items):
                    # Whoever arrives meanwhile may share the next batch.
                    batch = self._next_batch(items)
                    self._answer(batch)
        except BaseException as error:
            _log.critical("the reward model's loop has died", exc_info=error)
            self._end(f"The reward model's loop has died and this process must be started anew: {error!r}")
        finally:
            for ticket, _ in (*batch, *items):
                fail(ticket.future, BackendUnavailableError(self._ended))

    def _collect(self, items: list[Item]) -> bool:
        """Put all that arrived among the items, shortest first; False when the loop has to end."""
        self._pulse.rest()
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._waiting or items)
            arrived = list(self._waiting)
            self._waiting.clear()
        items += [(ticket, i) for ticket in arrived for i in range(len(ticket.conversations))]
        items[:] = [item for item in items if not item[0].future.done()]
        items.sort(key=_length)
        return self._ended is None

    def _next_batch(self, items: list[Item]) -> list[Item]:
        """Take the neighbours in length of whoever has waited longest, under the budget of tokens."""
        if not items:
            return []
        oldest = min(range(len(items)), key=lambda i: items[i][0].number)
        first = last = oldest
        while True:
            wider = [(a, b) for a, b in ((first - 1, last), (first, last + 1)) if a >= 0 and b < len(items)]
            fitting = [(a, b) for a, b in wider if self._may_share(_length(items[a]), _length(items[b]), b - a + 1)]
            if not fitting:
                break
            first, last = fitting[0]
        batch = items[first : last + 1]
        del items[first : last + 1]
        return batch

    def _may_share(self, shortest: int, longest: int, count: int) -> bool:
        return count <= self._rows(longest) and (not self._fixed or _blocks(shortest) == _blocks(longest))

    def _rows(self, length: int) -> int:
        if self._fixed:
            return max(1, FIXED_TOKENS // _blocks(length))
        return max(1, self._budget // length)

    def _end(self, why: str) -> None:
        with self._changed:
            self._ended = self._ended or why
            while self._waiting:
                fail(self._waiting.popleft().future, BackendUnavailableError(self._ended))
            self._changed.notify()

    def _answer(self, batch: list[Item]) -> None:
        """Score a batch; each request is answered as soon as its last score is known."""
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
        """Raw logits of one padded batch.

        transformers reads the score at the last token that is not the padding token, which is one too early where
        conversations end with that token. So the padding here is a token that none of them has.
        """
        self._pulse.beat()
        used = {token for c in conversations for token in c}
        padding = next((t for t in range(self._vocabulary) if t not in used), -1)
        if padding < 0 and len(conversations) > 1:
            return [self.scores([c])[0] for c in conversations]
        config = self._network.config.get_text_config()
        config.pad_token_id = padding
        width, rows = max(map(len, conversations)), conversations
        if self._fixed and padding >= 0:
            width = _blocks(width)
            rows = conversations + conversations[:1] * (self._rows(width) - len(conversations))
        device = self._network.device
        ids = torch.tensor([c + [padding] * (width - len(c)) for c in rows], device=device)
        lengths = torch.tensor([len(c) for c in rows], device=device)
        places = torch.arange(width, device=device)
        mask = (places < lengths.unsqueeze(1)).long()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        window = getattr(config, "max_position_embeddings", None) or width
        if width > window:  # padding alone stands beyond the window, where learned positions end
            inputs["position_ids"] = places.clamp(max=window - 1).expand(len(rows), -1)
        logits: Tensor = self._network(**inputs).logits
        return [float(value) for value in logits[: len(conversations), 0].float().tolist()]


def _length(item: Item) -> int:
    return len(item[0].conversations[item[1]])


def _blocks(length: int) -> int:
    """The fixed width of a row. No row is full: without any padding transformers leaves the mask out, and torch takes
    another kernel, whose last bits differ."""
    return (length // _BLOCK + 1) * _BLOCK


def _exact_head(network: Any) -> None:
    """Let the last product be made in float32, whatever the layers below are."""
    head = getattr(network, "score", None)
    if isinstance(head, torch.nn.Linear):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _release(network: Any) -> None:
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
