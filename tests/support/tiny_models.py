"""Random models of a few thousand parameters with a byte-level tokenizer, saved like real models without a download."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

BOS, END, PAD, TURN = "<bos>", "<end>", "<pad>", "<turn>"
ADDED = ("<improved>", "</improved>", "<think>", "</think>")
CONTEXT = 256

TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<turn>' + m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant: ' }}{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
ALTERNATING_TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}" + TEMPLATE
)


def make_tokenizer(template: str | None = TEMPLATE, pad: str | None = PAD) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose chat template adds one BOS token, like that of Llama."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (BOS, END, PAD, TURN)])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=pad, chat_template=template
    )


def _config(**changes: Any) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "initializer_range": 0.3,
        **changes,
    }


def save_llama(folder: Path, *, template: str | None = TEMPLATE, pad: str | None = PAD, **changes: Any) -> Path:
    """Save a policy: Llama with grouped key/value heads."""
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**_config(**changes))).save_pretrained(folder)
    make_tokenizer(template, pad).save_pretrained(folder)
    return folder


def save_sliding(folder: Path, *, mixed: bool) -> Path:
    """Save a policy with a sliding window of eight tokens in each layer (Mistral), or in one of two (Qwen 2)."""
    torch.manual_seed(8)
    if mixed:
        config = Qwen2Config(
            **_config(sliding_window=8, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])
        )
        Qwen2ForCausalLM(config).save_pretrained(folder)
    else:
        MistralForCausalLM(MistralConfig(**_config(sliding_window=8))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_capped(folder: Path) -> Path:
    """Save a policy with capped attention logits and a window of eight tokens in one of two layers (Gemma 2)."""
    torch.manual_seed(8)
    config = Gemma2Config(**_config(head_dim=8, sliding_window=8, attn_logit_softcapping=0.5))
    Gemma2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


KINDS = ("llama", "sliding", "mixed", "capped")
"""Kinds of policies, which differ in their attention."""


def load_kind(kind: str, folder: Path) -> Any:
    """Return a policy of one of these kinds in float32, with an attention that transformers computes exactly."""
    match kind:
        case "llama":
            save_llama(folder)
        case "capped":
            save_capped(folder)
        case _:
            save_sliding(folder, mixed=kind == "mixed")
    attention = "eager" if kind == "capped" else "sdpa"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def save_reward(folder: Path, *, template: str | None = TEMPLATE, pad: str | None = PAD, **changes: Any) -> Path:
    """Save a reward model: Llama with a head for one label."""
    torch.manual_seed(9)
    config = LlamaConfig(**_config(**{"num_labels": 1, **changes}))
    LlamaForSequenceClassification(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    make_tokenizer(template, pad).save_pretrained(folder)
    return folder
