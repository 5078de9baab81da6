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
"""Tokens in a block; with fixed shapes, rows are padded to whole blocks."""

_log = logging.getLogger(__name__)

Scores = tuple[float, ...]
_Item = tuple["_ScoreRequest", int]


@dataclass(eq=False)
class _ScoreRequest:
    """A submitted request: its tokenized conversations and the scores known so far."""

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
        self._waiting: deque[_ScoreRequest] = deque()
        self._stop_reason: str | None = None
        self._watchdog = Watchdog()
        self._thread = threading.Thread(target=self._run, name="reward", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False when the thread has stopped or a forward pass hangs."""
        return self._stop_reason is None and not self._watchdog.expired

    def submit(self, conversations: list[list[int]]) -> "Future[Scores]":
        """Queue conversations and return the future of their raw logits, one for each conversation.

        Raises BackendUnavailableError if the thread has stopped.
        """
        request = _ScoreRequest(conversations, next(self._numbers))
        if not conversations:
            succeed(request.future, ())
            return request.future
        with self._changed:
            if self._stop_reason:
                raise BackendUnavailableError(self._stop_reason)
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Stop the thread after the current batch."""
        self._stop("The reward model was closed.")
        self._thread.join()

    def _run(self) -> None:
        items: list[_Item] = []
        batch: list[_Item] = []
        try:
            with torch.inference_mode():
                while self._collect(items):
                    # Requests that arrive during a batch can share the next one.
                    batch = self._next_batch(items)
                    self._score_batch(batch)
        except BaseException as error:
            _log.critical("the reward model's loop has died", exc_info=error)
            self._stop(f"The reward model's loop has died and this process must be restarted: {error!r}")
        finally:
            for request, _ in (*batch, *items):
                fail(request.future, BackendUnavailableError(self._stop_reason))

    def _collect(self, items: list[_Item]) -> bool:
        """Wait for work and add new requests to the items, sorted by length. Return False when the loop must stop."""
        self._watchdog.disarm()
        with self._changed:
            self._changed.wait_for(lambda: self._stop_reason or self._waiting or items)
            arrived = list(self._waiting)
            self._waiting.clear()
        items += [(request, i) for request in arrived for i in range(len(request.conversations))]
        items[:] = [item for item in items if not item[0].future.done()]
        items.sort(key=_length)
        return self._stop_reason is None

    def _next_batch(self, items: list[_Item]) -> list[_Item]:
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

    def _stop(self, reason: str) -> None:
        """Make the loop stop, and fail the requests that the loop has not taken yet."""
        with self._changed:
            self._stop_reason = self._stop_reason or reason
            while self._waiting:
                fail(self._waiting.popleft().future, BackendUnavailableError(self._stop_reason))
            self._changed.notify()

    def _score_batch(self, batch: list[_Item]) -> None:
        """Score a batch, and set the result of each request whose last score is now known.

        A batch that fails is split in halves, so that only the faulty conversation fails.
        """
        if not batch:
            return
        try:
            scores = self.scores([request.conversations[i] for request, i in batch])
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            if len(batch) > 1:
                _free_cached_memory(self._network)
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self._score_batch(half)
                return
            what = "ran out of memory" if is_out_of_memory(error) else f"failed: {error!r}"
            fail(batch[0][0].future, BackendUnavailableError(f"The reward model {what}."))
            return
        for (request, i), score in zip(batch, scores, strict=True):
            request.scores[i] = score
            if len(request.scores) == len(request.conversations):
                succeed(request.future, tuple(request.scores[k] for k in range(len(request.scores))))

    def scores(self, conversations: list[list[int]]) -> list[float]:
        """Return the raw logits of one padded batch.

        transformers reads the score at the last token that is not the padding token. If a conversation ended with that
        token, it would read one token too early, so the padding token here is one that no conversation contains.
        """
        self._watchdog.arm()
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


def _length(item: _Item) -> int:
    """Return the number of tokens of an item's conversation."""
    return len(item[0].conversations[item[1]])


def _padded_width(length: int) -> int:
    """Return the fixed width of a row.

    A row always has some padding. Without any, transformers omits the mask, and torch chooses another kernel whose
    last bits differ.
    """
    return (length // _BLOCK + 1) * _BLOCK


def _use_float32_head(network: Any) -> None:
    """Make the head compute in float32, whatever the dtype of the other layers."""
    head = getattr(network, "score", None)
    if isinstance(head, torch.nn.Linear):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _free_cached_memory(network: Any) -> None:
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
