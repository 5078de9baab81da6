"""What the policy is trained on: one prompt and its right answer for each role it plays in the product.

The prompts are those of the shipped prompt set `tiny`, filled in as the product fills them in.
"""

import random
from dataclasses import dataclass

from tpo.core.prompts import Step, load

from demo import grammar
from demo.grammar import Facts, Reply

PROMPTS = load("tiny")
OPEN, CLOSE = PROMPTS.answer_tags
TAGS = ("<query>", "<chosen>", "<rejected>", "<critique>", "<suggestions>", OPEN, CLOSE)
"""The marks of the prompt set, each a token of its own."""

LIST_PROMPT = "List all that the chosen reply lacks.\n<query> {query}\n<chosen> {chosen}"
"""A prompt used in training alone: more claims about a reply than a critique makes, so more to learn from it."""

SHARES = {"answer": 9, "compare": 27, "review": 11, "list": 8, "suggest": 15, "update": 30}
"""How often each role comes, in percent."""

FOREIGN_SUGGESTIONS = 0.12
"""How often an update is asked for with suggestions that were written for another message and reply."""


@dataclass(frozen=True)
class Example:
    """A prompt, the right answer to it, and the role that it trains."""

    role: str
    prompt: str
    answer: str


def prompt(step: Step, **texts: str) -> str:
    """A prompt of the set `tiny` as the product fills it in: one user's turn."""
    ((_, text),) = PROMPTS.render(step, texts)
    return text


def make_pair(source: random.Random, facts: Facts) -> tuple[Reply, Reply]:
    """A chosen and a rejected reply such as the loop meets: fresh ones, and ones that were improved once or twice."""
    first, second = (grammar.make_reply(source, facts, share=source.choice((0.25, 0.33, 0.4, 0.55))) for _ in range(2))
    chosen, rejected = sorted((first, second), key=lambda reply: len(reply.missing))
    for _ in range(source.choice((0, 0, 0, 1, 1, 2))):
        chosen = grammar.apply(source, facts, chosen, grammar.criticise(chosen, rejected).suggested)
    return chosen, rejected


def make_example(source: random.Random, role: str | None = None) -> Example:
    """One training example, of the role given or of one drawn by SHARES."""
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
    said = grammar.critique_text(critique, facts, compared)
    if role == "compare":
        texts = {"query": facts.query, "chosen": chosen.text, "rejected": rejected.text}
        return Example(role, prompt("critique", **texts), said)
    if role == "review":
        return Example(role, prompt("critique", query=facts.query, chosen=chosen.text), said)
    if role == "suggest":
        return Example(role, prompt("gradient", critique=said), grammar.suggestions_text(critique.suggested, facts))
    return _update(source, facts, chosen, critique.suggested)


def _update(source: random.Random, facts: Facts, chosen: Reply, wanted: tuple[str, ...]) -> Example:
    words = facts
    if source.random() < FOREIGN_SUGGESTIONS:
        words = grammar.make_facts(source)
        wanted = grammar.criticise(*make_pair(source, words)).suggested
    elif source.random() < 0.3:
        wanted = tuple(kind for kind in grammar.QUALITIES if source.random() < 0.2)
    suggestions = grammar.suggestions_text(wanted, words)
    text = prompt("update", query=facts.query, chosen=chosen.text, gradient=suggestions)
    improved = grammar.apply(source, facts, chosen, wanted)
    return Example("update", text, f"{OPEN} {improved.text}{CLOSE}")
