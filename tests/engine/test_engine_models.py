"""Models that the engine supports, and errors for the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.tiny_models import make_tokenizer
from tpo.backends import load_policy
from tpo.backends.local.factory import EngineOptions, build_engine
from tpo.backends.local.requests import TokenRequest
from tpo.backends.spec import ModelSpec
from tpo.core.errors import ModelRefusedError
from tpo.core.ports import Generate
from tpo.core.state import Message
from tpo.settings import Settings

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SUPPORTED = [
    (LlamaForCausalLM, LlamaConfig(**SIZES)),
    (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=16)),
    (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, sliding_window=16)),
    (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16)),
    (Phi3ForCausalLM, Phi3Config(**SIZES)),
]

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def bloom(vocabulary: int = 300) -> Any:
    config: Any = BloomConfig
    model: Any = BloomForCausalLM
    return model(config(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize(("cls", "config"), SUPPORTED, ids=lambda x: getattr(x, "__name__", "config"))
def test_supported_families_equal_generate(cls: Any, config: Any) -> None:
    torch.manual_seed(3)
    model = cls(config).eval()
    prompt = [(5 * i) % 290 for i in range(70)]
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0)
    engine = build_engine(model, frozenset(), 512, EngineOptions(max_sequences=8, cache_gib=0.01, prefill_tokens=32))
    answer = engine.submit(TokenRequest(tuple(prompt), (1, 2), 0.0, 1.0, 40)).result(60)
    engine.close()
    assert {c.tokens for c in answer.completions} == {tuple(out[0, len(prompt) :].tolist())}


def test_model_with_own_attention_is_rejected_unchanged() -> None:
    model = bloom()
    before = model.config._attn_implementation
    with pytest.raises(ModelRefusedError, match=r"The policy x cannot be served by the engine.*TPO_ENGINE_FALLBACK"):
        build_engine(model, frozenset(), 512, name="The policy x")
    assert model.config._attn_implementation == before
    assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


def test_differing_logits_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    monkeypatch.setattr("tpo.backends.local.attention.merge_partial_outputs", lambda out, weight: out[0])
    with pytest.raises(ModelRefusedError, match="its logits differ"):
        build_engine(model.eval(), frozenset(), 512)


@pytest.mark.parametrize(
    ("error", "message"),
    [(RuntimeError("no kernel for this"), "no kernel for this.*TPO_ENGINE_FALLBACK"), (NO_MEMORY, "TPO_BATCH_ROWS")],
)
def test_model_that_fails_the_trial_is_rejected(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))

    def breaks(*_: object) -> None:
        raise error

    monkeypatch.setattr("tpo.backends.local.attention.causal_attention", breaks)
    with pytest.raises(ModelRefusedError, match=f"(?s)The policy x .*{message}"):
        build_engine(model.eval(), frozenset(), 512, name="The policy x")
    assert model.config._attn_implementation == "sdpa"


def test_too_small_cache_is_rejected() -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ModelRefusedError, match="TPO_CACHE_GIB"):
        build_engine(model.eval(), frozenset(), 512, EngineOptions(cache_gib=1e-6))


def test_fallback_respects_seeds(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    bloom(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelRefusedError, match="cannot be served by the engine"):
        load_policy(ModelSpec(str(tmp_path)), Settings())
    policy = load_policy(ModelSpec(str(tmp_path)), Settings(engine_fallback=True))

    def ask(*seeds: int) -> list[str]:
        request = Generate(
            kind="sample",
            iteration=0,
            first_sample=0,
            messages=(Message(role="user", content="Hi"),),
            seeds=seeds,
            temperature=0.7,
            top_p=0.95,
            max_tokens=12,
        )
        return [text.text for text in policy.generate(request, lambda: None).texts]

    assert ask(1, 2, 3) == [ask(seed)[0] for seed in (1, 2, 3)]
    assert policy.healthy
    policy.close()
    assert not policy.healthy
