"""Deterministic fakes of both models for tests, demonstrations and load tests.

They need no weights, no random numbers and no wall clock. A text depends only on the call's kind, its messages and the
seed. Each response carries a draft number. An update usually has a higher draft number than the drafts it was shown,
and higher drafts score higher, so that reward curves rise.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from tpo.core.ports import Generate, Generation, Interrupt, Rewards, Score, Text, cut_at
from tpo.core.state import CallKind, Message

_WORDS = (
    *("clear", "careful", "short", "honest", "useful", "example", "reason", "detail", "step", "answer", "question"),
    *("because", "first", "then", "finally", "means", "shows", "helps", "explains", "keeps", "avoids"),
    *("the", "a", "this", "that", "with", "for", "and", "of"),
)

_TAGS = re.compile(r"<(\w+)> and </\1>")
_FALLBACK_TAG = "improved"
_DRAFT = re.compile(r"\bDraft (\d{1,6})\b")
_POLL_SECONDS = 0.02


class ScriptedPolicy:
    """A policy whose texts are derived from a hash."""

    healthy = True

    def __init__(self, latency: float = 0.0, log: Path | None = None) -> None:
        self._latency = latency
        self._log = log

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Generate one text for each seed. With temperature 0 the seed is ignored."""
        started = time.perf_counter()
        _log_call(request.kind, request, self._log)
        _simulate_latency(self._latency, interrupt)
        texts = tuple(self._text(request, seed if request.temperature > 0 else 0) for seed in request.seeds)
        return Generation(
            texts=texts, input_tokens=_count_words(request.messages), seconds=time.perf_counter() - started
        )

    def close(self) -> None:
        """Do nothing: no thread runs."""

    def _text(self, request: Generate, seed: int) -> Text:
        conversation = "\x00".join(f"{m.role}\x01{m.content}" for m in request.messages)
        noise = _digest(request.kind, conversation, str(seed))
        words = _reply(request, noise).split(" ")
        written = " ".join(words[: request.max_tokens])
        text = cut_at(written, request.stop)
        complete = text != written or len(words) <= request.max_tokens
        return Text(text=text, finish_reason="stop" if complete else "length", tokens=len(text.split()))


class ScriptedRewardModel:
    """A reward model whose score is the draft number plus a hash of the text in [0, 1)."""

    healthy = True

    def __init__(self, latency: float = 0.0, log: Path | None = None) -> None:
        self._latency = latency
        self._log = log

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Return one score for each response; it depends only on the response's text."""
        started = time.perf_counter()
        _log_call("score", request, self._log)
        _simulate_latency(self._latency, interrupt)
        input_tokens = _count_words(request.messages) * len(request.responses) + sum(
            len(r.split()) for r in request.responses
        )
        values = tuple(_reward(response) for response in request.responses)
        return Rewards(values=values, input_tokens=input_tokens, seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Do nothing: no thread runs."""


def _reply(request: Generate, noise: bytes) -> str:
    prose = " ".join(_WORDS[byte % len(_WORDS)] for byte in noise[8 : 20 + noise[1] % 20])
    match request.kind:
        case "sample":
            return f"Draft {1 + noise[0] % 3}: {prose}."
        case "critique":
            return f"The chosen response is {prose}. The other one is not."
        case "gradient":
            return f"1. Say more of what is {prose}. 2. Say less of the rest."
        case "update":
            answer = f"Draft {_latest_draft(request.messages) + noise[0] % 4}: {prose}."
            if noise[2] < 256 // 20:
                return answer
            tag = _tag(request.messages[-1].content)
            return f"<{tag}> {answer} </{tag}>"


def _latest_draft(messages: Iterable[Message]) -> int:
    return max((int(number) for m in messages for number in _DRAFT.findall(m.content)), default=1)


def _tag(prompt: str) -> str:
    """Return the tag name that the prompt asks for, or the fallback: the demo's prompts name no tag."""
    names = _TAGS.findall(prompt)
    return str(names[-1]) if names else _FALLBACK_TAG


def _reward(response: str) -> float:
    draft = _DRAFT.search(response)
    fraction = int.from_bytes(_digest("score", response)[:4]) / 2**32
    return (int(draft.group(1)) if draft else 0) + fraction


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\x02".join(parts).encode("utf-8", "surrogatepass")).digest()


def _count_words(messages: Iterable[Message]) -> int:
    return sum(len(m.content.split()) for m in messages)


def _log_call(kind: CallKind, request: Generate | Score, log: Path | None) -> None:
    """Append the line `kind iteration digest pid` to the log.

    A single write keeps lines of several processes apart, and a killed process loses none.
    """
    if log is None:
        return
    digest = _digest(kind, repr(request)).hex()[:16]
    line = f"{kind} {request.iteration} {digest} {os.getpid()}\n"
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def _simulate_latency(seconds: float, interrupt: Interrupt) -> None:
    never = threading.Event()
    end = time.monotonic() + seconds
    interrupt()
    while (left := end - time.monotonic()) > 0:
        never.wait(min(left, _POLL_SECONDS))
        interrupt()
