"""Training examples of the policy: a prompt and the correct answer for each role that it has in the product.

The prompts are those of the shipped prompt set `tiny`, rendered as the product renders them.
"""

import random
from dataclasses import dataclass

from tpo.core.prompts import Step, load

from demo import grammar
from demo.grammar import Facts, Reply

PROMPTS = load("tiny")
OPEN, CLOSE = PROMPTS.answer_tags
TAGS = ("<query>", "<chosen>", "<rejected>", "<critique>", "<suggestions>", OPEN, CLOSE)
"""The tags of the prompt set; each is one token."""

LIST_PROMPT = "List all that the chosen reply lacks.\n<query> {query}\n<chosen> {chosen}"
"""A prompt used only in training. Its answer makes more claims about a reply than a critique, so it teaches more."""

SHARES = {"answer": 9, "compare": 27, "review": 11, "list": 8, "suggest": 15, "update": 30}
"""Frequency of each role, in percent."""

FOREIGN_SUGGESTIONS = 0.12
"""Share of updates whose suggestions were written for another message and reply."""


@dataclass(frozen=True)
class Example:
    """A prompt, its correct answer, and the role that it trains."""

    role: str
    prompt: str
    answer: str


def prompt(step: Step, **texts: str) -> str:
    """Render a prompt of the set `tiny` as the product does: one user turn."""
    ((_, text),) = PROMPTS.render(step, texts)
    return text


def make_pair(source: random.Random, facts: Facts) -> tuple[Reply, Reply]:
    """Make a chosen and a rejected reply as in the product's loop; the chosen one was improved up to two times."""
    first, second = (grammar.make_reply(source, facts, share=source.choice((0.25, 0.33, 0.4, 0.55))) for _ in range(2))
    chosen, rejected = sorted((first, second), key=lambda reply: len(reply.missing))
    for _ in range(source.choice((0, 0, 0, 1, 1, 2))):
        chosen = grammar.apply(source, facts, chosen, grammar.criticise(chosen, rejected).suggested)
    return chosen, rejected


def make_example(source: random.Random, role: str | None = None) -> Example:
    """Make a training example of the given role, or of one drawn by SHARES."""
    role = role or source.choices(list(SHARES), list(SHARES.values()))[0]
    facts = grammar.make_facts(source)
    if role == "answer":
        return Example(role, facts.query, grammar.make_reply(source, facts).text)
    chosen, rejected = make_pair(source, facts)
    if role == "list":
        text = LIST_PROMPT.format(query=facts.query, chosen=chosen.text)
        return Example(role, text, grammar.say_lacks(chosen.missing, facts))
    compared = role == "compare" or (role != "review" and source.random() < 0.7)
    critique = grammar.criticise(chosen, rejected if compared else None)
    critique_text = grammar.critique_text(critique, facts, compared)
    if role == "compare":
        texts = {"query": facts.query, "chosen": chosen.text, "rejected": rejected.text}
        return Example(role, prompt("critique", **texts), critique_text)
    if role == "review":
        return Example(role, prompt("critique", query=facts.query, chosen=chosen.text), critique_text)
    if role == "suggest":
        suggestions = grammar.suggestions_text(critique.suggested, facts)
        return Example(role, prompt("gradient", critique=critique_text), suggestions)
    return _update(source, facts, chosen, critique.suggested)


def _update(source: random.Random, facts: Facts, chosen: Reply, wanted: tuple[str, ...]) -> Example:
    stated = facts
    if source.random() < FOREIGN_SUGGESTIONS:
        stated = grammar.make_facts(source)
        wanted = grammar.criticise(*make_pair(source, stated)).suggested
    elif source.random() < 0.3:
        wanted = tuple(kind for kind in grammar.QUALITIES if source.random() < 0.2)
    suggestions = grammar.suggestions_text(wanted, stated)
    text = prompt("update", query=facts.query, chosen=chosen.text, gradient=suggestions)
    improved = grammar.apply(source, facts, chosen, wanted)
    return Example("update", text, f"{OPEN} {improved.text}{CLOSE}")
