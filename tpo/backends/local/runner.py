"""Runner: executes the scheduler's plan as forward passes of one model over the KV cache. It makes no decisions.

All tokens of a pass are packed into one row, [1, tokens]. Only the attention tells the sequences apart.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpo.backends.local.attention import (
    IMPLEMENTATION,
    AttentionParams,
    AttentionStep,
    DecodeAttention,
    KVCache,
    PrefillAttention,
    attention_step,
)
from tpo.backends.local.requests import TokenRequest
from tpo.backends.local.sampling import Sampler
from tpo.backends.local.scheduler import ActiveSequence, PrefillChunk
from tpo.core.errors import ModelRefusedError

_log = logging.getLogger(__name__)


class Batch:
    """Tensors of the running sequences, one row each, valid until a sequence starts or ends."""

    def __init__(self, rows: Sequence[ActiveSequence], device: torch.device) -> None:
        inputs = [row.request.inputs for row in rows]
        self.last_tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)
        self.steps = torch.tensor([len(row.tokens) for row in rows], device=device)
        self.positions = torch.tensor([row.position for row in rows], device=device)
        self.sampler = Sampler(
            [row.request.inputs.seeds[row.sample] for row in rows],
            [each.temperature for each in inputs],
            [each.top_p for each in inputs],
            device,
        )

    def advance(self, tokens: Tensor) -> None:
        """Record the token that each row has decoded."""
        self.last_tokens = tokens
        self.steps += 1
        self.positions += 1


class Runner:
    """One model, its KV cache and its forward passes. Needs only torch."""

    attention = "torch"

    def __init__(self, model: Any, shapes: dict[int, tuple[int, int, int]], slots: int) -> None:
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._model = model
        self._kv_cache = KVCache(shapes, slots, model.dtype, self.device)
        self._rows: list[ActiveSequence] = []
        self._batch: Batch | None = None

    def prefill(self, chunks: Sequence[PrefillChunk]) -> Tensor:
        """Prefill chunks of prompts.

        Return the logits after each prompt that ends with its chunk: [such prompts, vocabulary].
        """
        tokens = [token for chunk in chunks for token in chunk.prefill.prompt[chunk.begin : chunk.end]]
        ends, total = [], 0
        for chunk in chunks:
            total += chunk.end - chunk.begin
            if chunk.is_last:
                ends.append(total - 1)
        step = PrefillAttention(self._kv_cache, chunks, self.device)
        logits = self.forward(torch.tensor(tokens, device=self.device), step.positions, step, ends or [total - 1])
        return logits if ends else logits[:0]

    def first_tokens(self, logits: Tensor, request: TokenRequest, samples: Sequence[int]) -> list[int]:
        """Sample each sample's first token from the prompt's last logits [vocabulary]; -1 if they are not finite."""
        n = len(samples)
        sampler = Sampler(
            [request.seeds[i] for i in samples], [request.temperature] * n, [request.top_p] * n, self.device
        )
        steps = torch.zeros(n, dtype=torch.long, device=self.device)
        rows = logits.expand(n, -1)
        return _mark_non_finite(rows, sampler(rows, steps)).tolist()

    def decode(self, rows: list[ActiveSequence]) -> list[int]:
        """Decode one token for each row; -1 if its logits are not finite."""
        if self._batch is None or rows is not self._rows:
            self._rows, self._batch = rows, Batch(rows, self.device)
        batch = self._batch
        try:
            logits = self._decode_logits(batch, rows)
            tokens = _mark_non_finite(logits, batch.sampler(logits, batch.steps))
        except BaseException:
            self._batch = None
            raise
        batch.advance(tokens)
        return tokens.tolist()

    def decode_logits(self, rows: list[ActiveSequence]) -> Tensor:
        """Return the logits [rows, vocabulary] of a decode step, without sampling."""
        self._batch = None
        return self._decode_logits(Batch(rows, self.device), rows)

    def reset(self) -> None:
        """Discard the tensors of the last batch, and return torch's cached memory to the device."""
        self._rows, self._batch = [], None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, tokens: Tensor, positions: Tensor, step: AttentionStep, logits_for: Any = None) -> Tensor:
        """Run the model over packed tokens [tokens]. See `run_model`."""
        return run_model(self._model, tokens, positions, step, logits_for)

    def _decode_logits(self, batch: Batch, rows: list[ActiveSequence]) -> Tensor:
        return self.forward(batch.last_tokens, batch.positions, DecodeAttention(self._kv_cache, rows, self.device))


def run_model(model: Any, tokens: Tensor, positions: Tensor, step: AttentionStep, logits_for: Any = None) -> Tensor:
    """Run one forward pass over packed tokens [tokens] with their positions [tokens].

    `logits_for`: indices of the tokens whose logits are returned; default all. Result: [those tokens, vocabulary].
    """
    kept = 0 if logits_for is None else torch.as_tensor(logits_for, device=tokens.device)
    with attention_step(step):
        out = model(
            input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, logits_to_keep=kept
        )
    return out.logits[0]  # type: ignore[no-any-return]


class _Recorder:
    """Attention step that records the shapes of each layer's keys and values."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.calls = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        self.shapes[layer] = (k.shape[0], k.shape[2], v.shape[2])
        self.calls += 1
        return q.new_zeros(q.shape[1], q.shape[0], v.shape[2])


def install_attention(model: Any, name: str) -> dict[int, tuple[int, int, int]]:
    """Install the engine's attention in a model. Return (kv heads, key size, value size) of each layer.

    Raises ModelRefusedError if the model's attention cannot be replaced, or needs features that the engine lacks.
    """
    recorder = _Recorder()
    tokens = torch.arange(2, device=model.device)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        with torch.inference_mode():
            run_model(model, tokens, tokens, recorder)
    except Exception as error:
        raise ModelRefusedError(
            f"{name} cannot be served by the engine: {error or repr(error)}. {ALTERNATIVES}"
        ) from error
    layers = model.config.get_text_config().num_hidden_layers
    if recorder.calls != layers or len(recorder.shapes) != layers:
        raise ModelRefusedError(
            f"{name} cannot be served by the engine: its attention could be replaced {recorder.calls} times, but it "
            f"has {layers} layers. {ALTERNATIVES}"
        )
    return recorder.shapes


ALTERNATIVES = (
    "Use a model with plain causal attention (Llama, Qwen, Mistral, Gemma), serve this one elsewhere, or set "
    "TPO_ENGINE_FALLBACK=true to run it one request at a time."
)


def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits of every token, computed by the unmodified model."""
    with torch.inference_mode():
        return model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def check_logits(name: str, expected: Tensor, found: Tensor, dtype: torch.dtype) -> None:
    """Compare the engine's logits with the model's own. Raises ModelRefusedError if they differ."""
    spread = expected.std().clamp(min=1e-6)
    distance = float((expected - found).abs().mean() / spread)
    if not distance < (0.01 if dtype == torch.float32 else 0.2):
        raise ModelRefusedError(
            f"{name} cannot be served by the engine: its logits differ from the model's own by {distance:.2g} of their "
            f"spread. {ALTERNATIVES}"
        )
    _log.debug("the engine's logits differ from the model's own by %.2g of their spread", distance)


def _mark_non_finite(logits: Tensor, tokens: Tensor) -> Tensor:
    """Replace tokens [rows] whose logits [rows, vocabulary] are not finite by -1."""
    # A NaN anywhere in a row wins the argmax.
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return torch.where(chosen.isfinite(), tokens, -1)
