"""Training of the demo policy: next-token prediction from scratch, over all roles at once."""

import itertools
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import grammar
from demo.examples import Example, make_example
from demo.optimisation import Optimisers, load_checkpoint, save_checkpoint
from demo.settings import (
    ARCHITECTURE,
    BATCHES_A_STEP,
    CHECKPOINT_EVERY,
    LATE_STEP,
    MODELS,
    POLICY,
    SEED,
    SNAPSHOT_STEP,
    TOKENS_A_BATCH,
    WORK,
)
from demo.tokenizer import train_tokenizer

EXAMPLES_A_BLOCK = 2048
PROMPT_WEIGHT = 0.1
REPEATED_FACT_WEIGHT = 1.0
FACT_WEIGHT = 3.0
ROLE_WEIGHTS = {"answer": 1.0, "compare": 2.0, "review": 2.0, "list": 2.0, "suggest": 1.0, "update": 1.0}
LATE_ROLE_WEIGHTS = ROLE_WEIGHTS | {"suggest": 6.0}
"""Weights from LATE_STEP on. Suggestions weigh more because they are short and would be learned last."""

SNAPSHOT = WORK / "policy-snapshot"

Batch = tuple[torch.Tensor, torch.Tensor]


def architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the configuration that both models share."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=ARCHITECTURE.hidden,
        num_hidden_layers=ARCHITECTURE.layers,
        num_attention_heads=ARCHITECTURE.heads,
        num_key_value_heads=ARCHITECTURE.heads,
        intermediate_size=ARCHITECTURE.feed_forward,
        max_position_embeddings=ARCHITECTURE.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fact_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the tokens of the facts that a reply copies from a message.

    Raises ValueError if a fact is not exactly one token.
    """
    tokens = set()
    for word in (*grammar.NAMES, *grammar.ITEMS, *grammar.PROBLEMS, *grammar.ASKS):
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            raise ValueError(f"the fact {word!r} is not one token but {len(pieces)}")
        tokens.add(pieces[0])
    return frozenset(tokens)


def encode(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], role_weights: dict[str, float]
) -> list[tuple[list[int], list[float]]]:
    """Return token ids and loss weights of each example."""
    facts = fact_tokens(tokenizer)
    chats = [
        cast(str, tokenizer.apply_chat_template(_user_turn(example.prompt), tokenize=False, add_generation_prompt=True))
        for example in examples
    ]
    prompts = tokenizer(chats, add_special_tokens=False)["input_ids"]
    answers = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    encoded = []
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        base = role_weights[example.role]
        repeated = [token in facts and token in prompt[:i] for i, token in enumerate(prompt)]
        weights = [REPEATED_FACT_WEIGHT if is_repeated else PROMPT_WEIGHT for is_repeated in repeated]
        weights += [base * FACT_WEIGHT if token in facts else base for token in answer]
        encoded.append(([*prompt, *answer, cast(int, tokenizer.eos_token_id)], [*weights, base]))
    return encoded


def _user_turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[Batch]]:
    """Yield the batches of each step without end.

    A batch contains rows of similar length; the batches of a step have different lengths.
    """
    source = random.Random(seed)
    steps = 0
    while True:
        role_weights = ROLE_WEIGHTS if steps < LATE_STEP else LATE_ROLE_WEIGHTS
        block = encode(tokenizer, [make_example(source) for _ in range(EXAMPLES_A_BLOCK)], role_weights)
        block.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in block:
            if groups[-1] and len(row[0]) * (len(groups[-1]) + 1) > TOKENS_A_BATCH:
                groups.append([])
            groups[-1].append(row)
        source.shuffle(groups)
        padded = [_pad(group, cast(int, tokenizer.pad_token_id)) for group in groups]
        whole = len(padded) - len(padded) % BATCHES_A_STEP
        for i in range(0, whole, BATCHES_A_STEP):
            yield padded[i : i + BATCHES_A_STEP]
            steps += 1


def _pad(rows: Sequence[tuple[list[int], list[float]]], padding: int) -> Batch:
    length = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([row + [padding] * (length - len(row)) for row, _ in rows])
    weights = torch.tensor([row + [0.0] * (length - len(row)) for _, row in rows])
    return tokens, weights


def train_policy() -> None:
    """Train the policy. Writes a snapshot for the reward model to WORK and the result to MODELS."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(SEED)
    model = LlamaForCausalLM(architecture(tokenizer))
    model.train()
    optimisers = Optimisers(model, POLICY)
    checkpoint = WORK / "policy.pt"
    first = load_checkpoint(checkpoint, optimisers)
    facts = torch.tensor(sorted(fact_tokens(tokenizer)))
    started = time.monotonic()
    seen = 0
    answers: list[float] = []
    copies: list[float] = []
    stream = itertools.islice(batches(tokenizer, SEED), first, POLICY.steps)
    for step, parts in enumerate(stream, start=first):
        total = sum(weights[:, 1:].sum() for _, weights in parts)
        for tokens, weights in parts:
            losses, targets, weight = token_losses(model, tokens, weights)
            ((losses * weight).sum() / total).backward()  # type: ignore[no-untyped-call]
            answer = weight >= 1
            answers += losses[answer].tolist()
            copies += losses[answer & torch.isin(targets, facts)].tolist()
            seen += tokens.numel()
        optimisers.step(step)
        if (step + 1) % 100 == 0:
            print(
                f"policy step {step + 1}: {time.monotonic() - started:.0f} s, {seen / 1e6:.2f}M tokens, "
                f"loss {fmean(answers):.4f}, on copied facts {fmean(copies):.4f}",
                flush=True,
            )
            answers.clear()
            copies.clear()
        if step + 1 == SNAPSHOT_STEP:
            save_model(model, tokenizer, SNAPSHOT)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, step + 1, optimisers)
    save_model(model, tokenizer, MODELS / "policy")


def token_losses(model: Any, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return loss, target and weight of every predicted token with a positive weight, each of shape [tokens]."""
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        counted = weights[:, 1:] > 0
        logits = model.lm_head(states[:, :-1][counted])
    targets = tokens[:, 1:][counted]
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses, targets, weights[:, 1:][counted]


def save_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model with its tokenizer in the Hugging Face layout, atomically. Keeps an existing model card."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if isinstance(model, LlamaForCausalLM):
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if (folder / "README.md").exists():
        shutil.copy(folder / "README.md", part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
