"""Training of the demo reward model, from a snapshot of the policy that already copies facts.

Groups of replies to one message are compared in pairs (Bradley-Terry). The same head also learns the quality of the
reply so far at the end of every sentence. It learns to rise over every correct fact and every sentence with a new
quality, and to fall over a wrong fact and over a sentence that repeats an earlier one.
"""

import functools
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from demo import examples, grammar
from demo.faults import FAULTS, stray_facts
from demo.grammar import Facts, Reply
from demo.optimisation import Optimisers, load_checkpoint, save_checkpoint
from demo.policy_training import SNAPSHOT, fact_tokens, save_model
from demo.settings import CHECKPOINT_EVERY, MODELS, REPEATS_STEP, REWARD, SEED, WORK

GROUP = 4
GROUPS_A_STEP = 9
SAMPLED_SHARE = 0.2
SAMPLED_MESSAGES = 120
DENSE_WEIGHT = 0.5
FINAL_WEIGHT = 0.5
FACT_WEIGHT = 1.0
SENTENCE_WEIGHT = 1.0
FAULT_WEIGHTS = dict.fromkeys(FAULTS, 1) | {f"wrong {fact}": 4 for fact in ("name", "item", "problem", "ask")}
"""Relative frequency of each kind of fault. The most frequent ones can be recognised only with the message."""
LATE_FAULT_WEIGHTS = FAULT_WEIGHTS | {"repeat": 6, "cut": 2}
"""Relative frequencies from REPEATS_STEP on."""


@dataclass(frozen=True)
class Group:
    """Replies to one message."""

    facts: Facts
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Mark:
    """Two positions between which the reward must rise, or must fall if there is a fault between them."""

    before: int
    after: int
    rises: bool


@dataclass(frozen=True)
class Row:
    """A conversation as tokens, the positions where the quality so far is known, and its marks."""

    tokens: list[int]
    positions: list[int]
    values: list[float]
    facts: list[Mark]
    sentences: list[Mark]
    value: float


def make_group(source: random.Random, weights: dict[str, int]) -> Group:
    """Make a reply, copies of it with one fault each and sometimes other replies, in random order."""
    facts = grammar.make_facts(source)
    share = source.choice((0.3, 0.45, 0.6, 0.75, 0.9, 0.97))
    first = grammar.make_reply(source, facts, share, rude=source.choice((0.0, 0.3)))
    texts = [first.text]
    while len(texts) < GROUP:
        if source.random() < 0.65:
            damaged = damage(source, facts, first, weights)
            if source.random() < 0.15:
                damaged = damage(source, facts, damaged, weights)
            texts.append(damaged.text)
        else:
            stated = stray_facts(source, facts) if source.random() < 0.6 else facts
            texts.append(grammar.make_reply(source, stated, source.choice((share, share, 0.4))).text)
    source.shuffle(texts)
    return Group(facts, tuple(texts))


def damage(source: random.Random, facts: Facts, reply: Reply, weights: dict[str, int]) -> Reply:
    """Return the reply with one fault of a random kind that fits into it."""
    while True:
        (kind,) = source.choices(list(weights), list(weights.values()))
        damaged = FAULTS[kind](source, facts, reply)
        if damaged is not None and damaged.parts:
            return damaged


def draw_groups(source: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[Group]:
    """Sample groups of replies from the snapshot policy: first answers to messages, and improved ones."""
    model: Any = LlamaForCausalLM.from_pretrained(SNAPSHOT, dtype=torch.float32)
    model.eval()
    groups = []
    for _ in range(SAMPLED_MESSAGES // 20):
        all_facts, prompts = [], []
        for _ in range(10):
            facts = grammar.make_facts(source)
            chosen, rejected = examples.make_pair(source, facts)
            suggestions = grammar.suggestions_text(grammar.criticise(chosen, rejected).suggested, facts)
            texts = {"query": facts.query, "chosen": chosen.text, "gradient": suggestions}
            all_facts += [facts, facts]
            prompts += [facts.query, examples.prompt("update", **texts)]
        chats = [[{"role": "user", "content": text}] for text in prompts]
        inputs: Any = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=160, num_return_sequences=GROUP
            )
        texts_out = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        plain = [text.removeprefix(examples.OPEN).removesuffix(examples.CLOSE).strip() for text in texts_out]
        groups += [Group(facts, tuple(plain[i * GROUP : (i + 1) * GROUP])) for i, facts in enumerate(all_facts)]
    return groups


def encode(tokenizer: PreTrainedTokenizerFast, facts: Facts, text: str) -> Row:
    """Encode a conversation as the reward model sees it, with the marks and the quality after each sentence."""
    opening: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": facts.query}], tokenize=False, add_generation_prompt=True
    )
    tokens = list(_pieces(tokenizer, opening))
    copied = fact_tokens_of(tokenizer)
    sentences = grammar.read_sentences(text)
    row = Row(tokens, [], [], [], [], grammar.check_sentences(sentences, facts).value)
    covered: set[str] = set()
    for i, sentence in enumerate(sentences):
        before = len(tokens) - 1
        wrong = {stated for fact, stated in sentence.stated if stated != getattr(facts, fact)}
        for piece in _pieces(tokenizer, sentence.text):
            tokens.append(piece)
            if sentence.stated and piece in copied:
                row.facts.append(Mark(len(tokens) - 2, len(tokens) - 1, tokenizer.decode([piece]) not in wrong))
        row.positions.append(len(tokens) - 1)
        row.values.append(grammar.check_sentences(sentences[: i + 1], facts).value)
        if sentence.kind in grammar.ORDER and not wrong:
            row.sentences.append(Mark(before, len(tokens) - 1, sentence.kind not in covered))
            covered.add(sentence.kind)
    tokens.append(cast(int, tokenizer.eos_token_id))
    return row


@functools.lru_cache(maxsize=100_000)
def _pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@functools.lru_cache(maxsize=1)
def fact_tokens_of(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the tokens of copied facts, computed once per tokenizer."""
    return fact_tokens(tokenizer)


def steps(tokenizer: PreTrainedTokenizerFast, sampled: list[Group]) -> Iterator[list[Row]]:
    """Yield the rows of each training step without end: GROUP rows per message, GROUPS_A_STEP messages."""
    source = random.Random(SEED)
    for step in itertools.count():
        weights = FAULT_WEIGHTS if step < REPEATS_STEP else LATE_FAULT_WEIGHTS
        groups = [
            source.choice(sampled) if source.random() < SAMPLED_SHARE else make_group(source, weights)
            for _ in range(GROUPS_A_STEP)
        ]
        yield [encode(tokenizer, group.facts, text) for group in groups for text in group.texts]


def mark_loss(scores: torch.Tensor, marks: Sequence[Sequence[Mark]]) -> torch.Tensor:
    """Return the loss of `scores`, of shape [rows, length], at the marks of each row.

    Rising and falling marks have the same total weight.
    """
    row = [i for i, of_row in enumerate(marks) for _ in of_row]
    before = [mark.before for of_row in marks for mark in of_row]
    after = [mark.after for of_row in marks for mark in of_row]
    rises = torch.tensor([float(mark.rises) for of_row in marks for mark in of_row])
    weight = torch.where(rises > 0, 0.5 / rises.sum().clamp(min=1), 0.5 / (1 - rises).sum().clamp(min=1))
    change = scores[row, after] - scores[row, before]
    return (functional.binary_cross_entropy_with_logits(2 * change, rises, reduction="none") * weight).sum()


def reward_loss(model: Any, rows: list[Row], padding: int, sentence_weight: float) -> tuple[torch.Tensor, ...]:
    """Return the loss of one step, the share of unequal pairs in the right order, and the fact and sentence losses."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([row.tokens + [padding] * (length - len(row.tokens)) for row in rows])
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    scores = model.score(states.float())[..., 0]
    rewards = scores[range(len(rows)), [len(row.tokens) - 1 for row in rows]]
    values = torch.tensor([row.value for row in rows])

    index = [i for i, row in enumerate(rows) for _ in row.positions]
    position = [place for row in rows for place in row.positions]
    known = torch.tensor([value for row in rows for value in row.values])
    dense = functional.smooth_l1_loss(scores[index, position], known)
    final = functional.smooth_l1_loss(rewards, values)
    facts = mark_loss(scores, [row.facts for row in rows])
    sentences = mark_loss(scores, [row.sentences for row in rows])

    first, second = torch.triu_indices(GROUP, GROUP, 1)
    difference = (rewards.view(-1, GROUP)[:, first] - rewards.view(-1, GROUP)[:, second]).flatten()
    better = (values.view(-1, GROUP)[:, first] - values.view(-1, GROUP)[:, second]).flatten()
    pairs = functional.binary_cross_entropy_with_logits(difference, torch.sigmoid(better))
    clear = better != 0
    ordered = ((difference > 0) == (better > 0))[clear].float().mean()
    loss = pairs + DENSE_WEIGHT * dense + FINAL_WEIGHT * final + FACT_WEIGHT * facts + sentence_weight * sentences
    return loss, ordered, facts, sentences


def train_reward() -> None:
    """Wait for the policy's snapshot, train the reward model from it and write the result to MODELS."""
    while not SNAPSHOT.exists():
        time.sleep(5)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SNAPSHOT)
    sampled = draw_groups(random.Random(SEED), tokenizer)
    model: Any = LlamaForSequenceClassification.from_pretrained(SNAPSHOT, num_labels=1, dtype=torch.float32)
    model.train()
    with torch.no_grad():
        model.score.weight.mul_(0.1)
    optimisers = Optimisers(model, REWARD)
    checkpoint = WORK / "reward.pt"
    first = load_checkpoint(checkpoint, optimisers)
    started = time.monotonic()
    stream = itertools.islice(steps(tokenizer, sampled), first, REWARD.steps)
    recent: list[list[float]] = []
    for step, rows in enumerate(stream, start=first):
        sentence_weight = SENTENCE_WEIGHT if step >= REPEATS_STEP else 0.0
        losses = reward_loss(model, rows, cast(int, tokenizer.pad_token_id), sentence_weight)
        losses[0].backward()  # type: ignore[no-untyped-call]
        optimisers.step(step)
        recent.append([value.item() for value in losses])
        if (step + 1) % 50 == 0:
            loss, ordered, facts, sentences = (fmean(column) for column in zip(*recent, strict=True))
            print(
                f"reward step {step + 1}: {time.monotonic() - started:.0f} s, loss {loss:.4f}, "
                f"pairs in the right order {ordered:.3f}, loss on facts {facts:.3f}, on sentences {sentences:.3f}",
                flush=True,
            )
            recent.clear()
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, step + 1, optimisers)
    save_model(model, tokenizer, MODELS / "reward")
