"""From a loaded model to an engine that serves it: attention put in, memory measured, and all tried out once."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from tpo.backends.local.engine import StepEngine, is_out_of_memory
from tpo.backends.local.kv_allocator import Piece, Segment
from tpo.backends.local.requests import Ticket, Timings, TokenRequest
from tpo.backends.local.runner import INSTEAD, Runner, compare, install_attention, plain_logits
from tpo.backends.local.sampling import Sampler
from tpo.backends.local.scheduler import ActiveSequence, Limits, PrefillChunk, PrefillRequest
from tpo.core.errors import ModelRefusedError

_log = logging.getLogger(__name__)

_GIB = 2**30
_SPARE = 0.92
"""Of the memory that is free on a GPU: the rest is for fragments and other processes."""


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine may hold. None: measured on a GPU, modest on a CPU."""

    rows: int = 512
    cache_gib: float | None = None
    prefill_tokens: int | None = None


def build_engine(
    model: Any, stop_tokens: frozenset[int], context: int, options: EngineOptions | None = None, name: str = "The model"
) -> StepEngine:
    """An engine for a causal language model of transformers. Raises ModelRefusedError for one that it cannot serve.

    From here on the model's own `generate` no longer works: its attention is the engine's.
    """
    before = model.config._attn_implementation
    try:
        with torch.inference_mode():
            return _built(model, stop_tokens, context, options or EngineOptions(), name)
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, ModelRefusedError):
            raise
        if is_out_of_memory(error):
            raise ModelRefusedError(
                f"{name} ran out of memory when its engine was tried out. Lower TPO_BATCH_ROWS, TPO_PREFILL_TOKENS or "
                f"TPO_CACHE_GIB, or take a smaller model. {error}"
            ) from error
        raise ModelRefusedError(f"{name} cannot be served by the engine: {error!r}. {INSTEAD}") from error


def _built(model: Any, stop_tokens: frozenset[int], context: int, options: EngineOptions, name: str) -> StepEngine:
    on_gpu = model.device.type == "cuda"
    chunk = options.prefill_tokens or (4096 if on_gpu else 512)
    probe = [(7 * i + 3) % model.get_input_embeddings().weight.shape[0] for i in range(48)]
    expected = plain_logits(model, torch.tensor(probe, device=model.device))
    shapes = install_attention(model, name)
    _try(Runner(model, shapes, 64), probe, expected, name)
    each = sum(heads * (k + v) for heads, k, v in shapes.values()) * model.dtype.itemsize
    slots = min(_memory(model, shapes, options, context, chunk) // each, options.rows * context)
    if slots < len(probe) + 16:
        raise ModelRefusedError(
            f"{name} leaves no memory for keys and values, which take {each} bytes a token. Raise TPO_CACHE_GIB where "
            "it is set, or take a smaller model or a GPU with more memory."
        )
    runner = _runner(model, shapes, slots, options.rows, context, probe, expected, name)
    _log.info("engine: %s attention, %d slots of %d bytes", runner.attention, slots, each)
    return StepEngine(runner, Limits(options.rows, slots, chunk, patience=8 if on_gpu else 0), stop_tokens)


def _runner(
    model: Any, shapes: Any, slots: int, rows: int, context: int, probe: list[int], expected: Any, name: str
) -> Runner:
    if model.device.type == "cuda":
        try:
            from tpo.backends.local.cuda import CudaRunner

            # The trial below decodes two rows.
            runner = CudaRunner(model, shapes, slots, max(rows, 2), min(context, slots))
            _try(runner, probe, expected, name)
        except Exception as error:
            _log.warning("the fast decode step does not run on this GPU, the slow one takes its place: %r", error)
        else:
            return runner
    return Runner(model, shapes, slots)


def _memory(model: Any, shapes: Any, options: EngineOptions, context: int, chunk: int) -> int:
    """Bytes for keys and values."""
    if options.cache_gib is not None or model.device.type != "cuda":
        return int((options.cache_gib or 2.0) * _GIB)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner = Runner(model, shapes, chunk)
    segment = Segment(1, chunk, chunk)
    ticket = Ticket(TokenRequest((0,) * chunk, (0,), 0.7, 0.95, 1), 0, Timings(0.0))
    runner.prefill([PrefillChunk(PrefillRequest(ticket, [0], (Piece(segment, chunk),), 0), 0, chunk)])
    logits = torch.zeros(options.rows, runner.vocabulary, device=model.device)
    Sampler([0] * options.rows, [0.7] * options.rows, [0.95] * options.rows, model.device)(
        logits, torch.zeros(options.rows, dtype=torch.long, device=model.device)
    )
    needed = torch.cuda.max_memory_allocated() - before
    del runner, logits
    torch.cuda.empty_cache()
    tables = 4 * options.rows * context
    return int(torch.cuda.mem_get_info()[0] * _SPARE) - needed - tables


def _try(runner: Runner, probe: list[int], expected: Any, name: str) -> None:
    """A prompt in two parts, then token after token: the same logits as the model's own."""
    read = len(probe) - 6
    ticket = Ticket(TokenRequest(tuple(probe[:read]), (0, 0), 0.0, 1.0, 8), 0, Timings(time.monotonic()))
    reading = PrefillRequest(ticket, [0, 1], (Piece(Segment(2, read, read), read),), 0)
    runner.prefill([PrefillChunk(reading, 0, 29)])
    found = [runner.prefill([PrefillChunk(reading, 29, read)])]
    rows = [ActiveSequence(ticket, i, reading.chain, [], [Segment(read + 2 + 8 * i, 8)]) for i in range(2)]
    for token in probe[read:]:
        for row in rows:
            row.tokens.append(token)
            row.own[0].used = len(row.tokens)
        found.append(runner.logits_of(list(rows))[:1])
    compare(name, expected[read - 1 :], torch.cat(found).float(), runner.dtype)
