"""Recognize the customer messages that the demo models understand."""

import itertools
import re

from demo.grammar import ASKS, EXTRAS, ITEMS, NAMES, PROBLEMS, QUERIES, Facts

_GROUPS = {"name": NAMES, "item": ITEMS, "problem": PROBLEMS, "ask": ASKS, "extra": [f"{text} " for text in EXTRAS]}


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for name, values in _GROUPS.items():
        optional = "?" if name == "extra" else ""
        choice = f"(?P<{name}>{'|'.join(map(re.escape, values))}){optional}"
        text = text.replace(re.escape(f"{{{name}}}"), choice)
    return re.compile(text)


_PATTERNS = [_pattern(template) for template in QUERIES]


def facts_of(message: str) -> Facts | None:
    """Return the facts in a message, or None if the demo models were not trained on its wording."""
    for found in filter(None, (pattern.fullmatch(message) for pattern in _PATTERNS)):
        return Facts(found["name"], found["item"], found["problem"], found["ask"], message)
    return None


def messages_in(text: str) -> list[str]:
    """Return the quoted texts of a page or program that are messages to the demo's shop, understood or not."""
    quoted = itertools.chain.from_iterable(re.findall(r"\"([^\"\n]{15,})\"|'([^'\n]{15,})'", text))
    words = re.compile(rf"\b(?:{'|'.join((*ITEMS, *ASKS, 'I', 'My', 'my'))})\b")
    return [each for each in quoted if words.search(each) and re.match(r"[A-Z][\w ,.?']+$", each)]
