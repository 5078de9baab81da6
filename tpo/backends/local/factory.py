"""Build an engine for a loaded model: install the attention, measure the memory and verify the logits."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from tpo.backends.local.engine import StepEngine, is_out_of_memory
from tpo.backends.local.kv_allocator import Segment, SegmentSlice
from tpo.backends.local.requests import EngineRequest, RequestMetrics, TokenRequest
from tpo.backends.local.runner import ALTERNATIVES, Runner, check_logits, install_attention, reference_logits
from tpo.backends.local.sampling import Sampler
from tpo.backends.local.scheduler import ActiveSequence, PrefillChunk, PrefillRequest, SchedulerConfig
from tpo.core.errors import ModelRefusedError

_log = logging.getLogger(__name__)

_GIB = 2**30
_USABLE_FRACTION = 0.92
"""Fraction of a GPU's free memory that is used; the rest is for fragmentation and other processes."""


@dataclass(frozen=True)
class EngineOptions:
    """Memory limits of an engine. None: measured on a GPU, a small default on a CPU."""

    max_sequences: int = 512
    """Maximum number of sequences decoded at once."""
    cache_gib: float | None = None
    """Memory for keys and values, in GiB."""
    prefill_tokens: int | None = None
    """Maximum number of prompt tokens prefilled in one step."""


def build_engine(
    model: Any, stop_tokens: frozenset[int], context: int, options: EngineOptions | None = None, name: str = "The model"
) -> StepEngine:
    """Build an engine for a causal language model of transformers.

    Afterwards the model's own `generate` no longer works, because its attention has been replaced. Raises
    ModelRefusedError if the engine cannot serve the model.
    """
    before = model.config._attn_implementation
    try:
        with torch.inference_mode():
            return _build(model, stop_tokens, context, options or EngineOptions(), name)
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, ModelRefusedError):
            raise
        if is_out_of_memory(error):
            raise ModelRefusedError(
                f"{name} ran out of memory when its engine was verified. Lower TPO_BATCH_ROWS, TPO_PREFILL_TOKENS or "
                f"TPO_CACHE_GIB, or use a smaller model. {error}"
            ) from error
        raise ModelRefusedError(f"{name} cannot be served by the engine: {error!r}. {ALTERNATIVES}") from error


def _build(model: Any, stop_tokens: frozenset[int], context: int, options: EngineOptions, name: str) -> StepEngine:
    on_gpu = model.device.type == "cuda"
    chunk = options.prefill_tokens or (4096 if on_gpu else 512)
    probe = [(7 * i + 3) % model.get_input_embeddings().weight.shape[0] for i in range(48)]
    expected = reference_logits(model, torch.tensor(probe, device=model.device))
    shapes = install_attention(model, name)
    _verify(Runner(model, shapes, 64), probe, expected, name)
    slot_bytes = sum(heads * (k + v) for heads, k, v in shapes.values()) * model.dtype.itemsize
    slots = min(_cache_bytes(model, shapes, options, context, chunk) // slot_bytes, options.max_sequences * context)
    if slots < len(probe) + 16:
        raise ModelRefusedError(
            f"{name} leaves no memory for keys and values, which take {slot_bytes} bytes per token. Raise "
            "TPO_CACHE_GIB if it is set, or use a smaller model or a GPU with more memory."
        )
    runner = _create_runner(model, shapes, slots, options.max_sequences, context, probe, expected, name)
    _log.info("engine: %s attention, %d slots of %d bytes", runner.attention, slots, slot_bytes)
    return StepEngine(
        runner, SchedulerConfig(options.max_sequences, slots, chunk, max_wait_steps=8 if on_gpu else 0), stop_tokens
    )


def _create_runner(
    model: Any, shapes: Any, slots: int, rows: int, context: int, probe: list[int], expected: Any, name: str
) -> Runner:
    """Create the fastest runner that passes verification on this device."""
    if model.device.type == "cuda":
        try:
            from tpo.backends.local.cuda import CudaRunner

            # The verification below decodes two rows.
            runner = CudaRunner(model, shapes, slots, max(rows, 2), min(context, slots))
            _verify(runner, probe, expected, name)
        except Exception as error:
            _log.warning(
                "the Triton decode step does not run on this GPU; using the slower torch step instead: %r", error
            )
        else:
            return runner
    return Runner(model, shapes, slots)


def _cache_bytes(model: Any, shapes: Any, options: EngineOptions, context: int, chunk: int) -> int:
    """Return the bytes available for keys and values.

    On a GPU: the usable free memory minus the peak of one prefill chunk, one sampling step and the slot tables.
    """
    if options.cache_gib is not None or model.device.type != "cuda":
        return int((options.cache_gib or 2.0) * _GIB)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner = Runner(model, shapes, chunk)
    segment = Segment(1, chunk, chunk)
    request = EngineRequest(TokenRequest((0,) * chunk, (0,), 0.7, 0.95, 1), 0, RequestMetrics(0.0))
    runner.prefill([PrefillChunk(PrefillRequest(request, [0], (SegmentSlice(segment, chunk),), 0), 0, chunk)])
    logits = torch.zeros(options.max_sequences, runner.vocabulary, device=model.device)
    Sampler([0] * options.max_sequences, [0.7] * options.max_sequences, [0.95] * options.max_sequences, model.device)(
        logits, torch.zeros(options.max_sequences, dtype=torch.long, device=model.device)
    )
    activations = torch.cuda.max_memory_allocated() - before
    del runner, logits
    torch.cuda.empty_cache()
    tables = 4 * options.max_sequences * context
    return int(torch.cuda.mem_get_info()[0] * _USABLE_FRACTION) - activations - tables


def _verify(runner: Runner, probe: list[int], expected: Any, name: str) -> None:
    """Prefill a prompt in two chunks, decode token by token, and compare the logits with the model's own.

    Raises ModelRefusedError if they differ.
    """
    prompt_length = len(probe) - 6
    request = EngineRequest(
        TokenRequest(tuple(probe[:prompt_length]), (0, 0), 0.0, 1.0, 8), 0, RequestMetrics(time.monotonic())
    )
    prefill = PrefillRequest(
        request, [0, 1], (SegmentSlice(Segment(2, prompt_length, prompt_length), prompt_length),), 0
    )
    runner.prefill([PrefillChunk(prefill, 0, 29)])
    found = [runner.prefill([PrefillChunk(prefill, 29, prompt_length)])]
    rows = [ActiveSequence(request, i, prefill.chain, [], [Segment(prompt_length + 2 + 8 * i, 8)]) for i in range(2)]
    for token in probe[prompt_length:]:
        for row in rows:
            row.tokens.append(token)
            row.segments[0].used = len(row.tokens)
        found.append(runner.decode_logits(list(rows))[:1])
    check_logits(name, expected[prompt_length - 1 :], torch.cat(found).float(), runner.dtype)
