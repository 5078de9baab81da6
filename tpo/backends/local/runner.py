"""Executes what the scheduler has decided: forward passes of one model over the arena. Decides nothing.

Everything is packed into one row of tokens, [1, tokens]; which token belongs to whom is known to the attention alone.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpo.backends.local.attention import NAME, DecodeStep, Head, KVCache, PrefillStep, Step, using
from tpo.backends.local.requests import TokenRequest
from tpo.backends.local.sampling import Sampler
from tpo.backends.local.scheduler import ActiveSequence, PrefillChunk
from tpo.core.errors import ModelRefusedError

_log = logging.getLogger(__name__)


class Batch:
    """The rows' tensors, valid until a row joins or leaves."""

    def __init__(self, rows: Sequence[ActiveSequence], device: torch.device) -> None:
        requests = [row.ticket.request for row in rows]
        self.last = torch.tensor([row.tokens[-1] for row in rows], device=device)
        self.steps = torch.tensor([len(row.tokens) for row in rows], device=device)
        self.positions = torch.tensor([row.position for row in rows], device=device)
        self.sample = Sampler(
            [row.ticket.request.seeds[row.sample] for row in rows],
            [request.temperature for request in requests],
            [request.top_p for request in requests],
            device,
        )

    def advance(self, tokens: Tensor) -> None:
        """Every row has one token more."""
        self.last = tokens
        self.steps += 1
        self.positions += 1


class Runner:
    """One model, its keys and values, and its forward passes. Needs torch alone."""

    attention = "torch"

    def __init__(self, model: Any, shapes: dict[int, tuple[int, int, int]], slots: int) -> None:
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._model = model
        self._store = KVCache(shapes, slots, model.dtype, self.device)
        self._rows: list[ActiveSequence] = []
        self._batch: Batch | None = None

    def prefill(self, chunks: Sequence[PrefillChunk]) -> Tensor:
        """Read parts of prompts. Logits [prompts that end here, vocabulary]."""
        tokens = [token for chunk in chunks for token in chunk.reading.prompt[chunk.begin : chunk.end]]
        ends, at = [], 0
        for chunk in chunks:
            at += chunk.end - chunk.begin
            if chunk.last:
                ends.append(at - 1)
        step = PrefillStep(self._store, chunks, self.device)
        logits = self.forward(torch.tensor(tokens, device=self.device), step.positions, step, ends or [at - 1])
        return logits if ends else logits[:0]

    def first_tokens(self, logits: Tensor, request: TokenRequest, samples: Sequence[int]) -> list[int]:
        """Each sample's first token, from the prompt's last logits [vocabulary]; -1 where they are no numbers."""
        n = len(samples)
        sample = Sampler(
            [request.seeds[i] for i in samples], [request.temperature] * n, [request.top_p] * n, self.device
        )
        steps = torch.zeros(n, dtype=torch.long, device=self.device)
        rows = logits.expand(n, -1)
        return _checked(rows, sample(rows, steps)).tolist()

    def decode(self, rows: list[ActiveSequence]) -> list[int]:
        """One token for each row; -1 where the logits are no numbers."""
        if self._batch is None or rows is not self._rows:
            self._rows, self._batch = rows, Batch(rows, self.device)
        batch = self._batch
        try:
            logits = self._decode_logits(batch, rows)
            tokens = _checked(logits, batch.sample(logits, batch.steps))
        except BaseException:
            self._batch = None
            raise
        batch.advance(tokens)
        return tokens.tolist()

    def logits_of(self, rows: list[ActiveSequence]) -> Tensor:
        """The logits [rows, vocabulary] of a step, without a token drawn."""
        self._batch = None
        return self._decode_logits(Batch(rows, self.device), rows)

    def forget(self) -> None:
        """The next step has other rows; memory that was only cached goes back to the device."""
        self._rows, self._batch = [], None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, tokens: Tensor, positions: Tensor, step: Step, keep: Any = None) -> Tensor:
        """Logits [kept tokens, vocabulary]."""
        return run_model(self._model, tokens, positions, step, keep)

    def _decode_logits(self, batch: Batch, rows: list[ActiveSequence]) -> Tensor:
        return self.forward(batch.last, batch.positions, DecodeStep(self._store, rows, self.device))


def run_model(model: Any, tokens: Tensor, positions: Tensor, step: Step, keep: Any = None) -> Tensor:
    """One forward pass over packed tokens; `keep` lists those whose logits are wanted, all by default."""
    kept = 0 if keep is None else torch.as_tensor(keep, device=tokens.device)
    with using(step):
        out = model(
            input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, logits_to_keep=kept
        )
    return out.logits[0]  # type: ignore[no-any-return]


class _Recorder:
    """Stands in for attention to learn what each layer keeps."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.calls = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, head: Head) -> Tensor:
        self.shapes[layer] = (k.shape[0], k.shape[2], v.shape[2])
        self.calls += 1
        return q.new_zeros(q.shape[1], q.shape[0], v.shape[2])


def install_attention(model: Any, name: str) -> dict[int, tuple[int, int, int]]:
    """Put the arena's attention into a model. Gives (kv heads, key size, value size) of each layer.

    Raises ModelRefusedError where the model does not let its attention be replaced, or wants more of it than there is.
    """
    recorder = _Recorder()
    tokens = torch.arange(2, device=model.device)
    try:
        model.set_attn_implementation(NAME)
        with torch.inference_mode():
            run_model(model, tokens, tokens, recorder)
    except Exception as error:
        raise ModelRefusedError(f"{name} cannot be served by the engine: {error or repr(error)}. {INSTEAD}") from error
    layers = model.config.get_text_config().num_hidden_layers
    if recorder.calls != layers or len(recorder.shapes) != layers:
        raise ModelRefusedError(
            f"{name} cannot be served by the engine: of its {layers} layers, {recorder.calls} let their attention be "
            f"replaced. {INSTEAD}"
        )
    return recorder.shapes


INSTEAD = (
    "Take a model with plain causal attention (Llama, Qwen, Mistral, Gemma), serve this one elsewhere, or set "
    "TPO_ENGINE_FALLBACK=true to run it one request at a time."
)


def plain_logits(model: Any, tokens: Tensor) -> Tensor:
    """The logits of every token by the model as it is."""
    with torch.inference_mode():
        return model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def compare(name: str, expected: Tensor, found: Tensor, dtype: torch.dtype) -> None:
    """Raises ModelRefusedError where the engine's logits are not the model's."""
    spread = expected.std().clamp(min=1e-6)
    distance = float((expected - found).abs().mean() / spread)
    if not distance < (0.01 if dtype == torch.float32 else 0.2):
        raise ModelRefusedError(
            f"{name} cannot be served by the engine: its logits differ from the model's own by {distance:.2g} of their "
            f"spread. {INSTEAD}"
        )
    _log.debug("the engine's logits differ from the model's own by %.2g of their spread", distance)


def _checked(logits: Tensor, tokens: Tensor) -> Tensor:
    # A NaN anywhere in a row wins its argmax.
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return torch.where(chosen.isfinite(), tokens, -1)
