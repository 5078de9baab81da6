"""Single faults: each function turns a reply into the same reply with one fault.

The reward model learns from them, and is evaluated with them on held-out messages.
"""

import dataclasses
import random
import re
from collections.abc import Callable

from demo import grammar
from demo.grammar import Facts, Part, Reply

_SYLLABLES = ("ba", "de", "fi", "go", "ka", "le", "mu", "no", "pa", "re", "si", "to", "va", "wi", "za")
_OTHERS = {"name": grammar.NAMES, "item": grammar.ITEMS, "problem": grammar.PROBLEMS, "ask": grammar.ASKS}


def _replace(reply: Reply, place: int, *texts: str) -> Reply:
    """Return the reply with the sentence at `place` replaced by `texts`."""
    new = tuple(Part(reply.parts[place].kind, text) for text in texts)
    return Reply((*reply.parts[:place], *new, *reply.parts[place + 1 :]))


def _wrong(fact: str) -> Callable[[random.Random, Facts, Reply], Reply | None]:
    def damage(source: random.Random, facts: Facts, reply: Reply) -> Reply | None:
        right = getattr(facts, fact)
        word = re.compile(rf"\b{right}\b")
        places = [i for i, part in enumerate(reply.parts) if word.search(part.text)]
        if not places:
            return None
        place = source.choice(places)
        other = source.choice([value for value in _OTHERS[fact] if value != right])
        return _replace(reply, place, word.sub(other, reply.parts[place].text))

    return damage


def _repeat(source: random.Random, facts: Facts, reply: Reply) -> Reply | None:
    places = [i for i, part in enumerate(reply.parts) if part.kind != grammar.POLITE]
    if not places:
        return None
    place = source.choice(places)
    part = reply.parts[place]
    again = part.text if source.random() < 0.5 else grammar.make_sentence(source, part.kind, facts)
    if source.random() < 0.5:
        return _replace(reply, place, part.text, again)
    later = source.randint(place + 1, len(reply.parts))
    return Reply((*reply.parts[:later], Part(part.kind, again), *reply.parts[later:]))


def _cut(source: random.Random, facts: Facts, reply: Reply) -> Reply | None:
    """Cut the last sentence short, or drop a word from any sentence that a reply needs."""
    places = [i for i, part in enumerate(reply.parts) if part.kind != grammar.POLITE and " " in part.text]
    last = len(reply.parts) - 1
    if " " in reply.parts[last].text and (source.random() < 0.5 or not places):
        place = last
        words = reply.parts[place].text.split()
        kept = words[: source.randrange(1, len(words))]
    elif not places:
        return None
    else:
        place = source.choice(places)
        words = reply.parts[place].text.split()
        lost = source.randrange(len(words))
        kept = words[:lost] + words[lost + 1 :]
    return _replace(reply, place, " ".join(kept))


def _invented_word(source: random.Random, facts: Facts, reply: Reply) -> Reply | None:
    places = [i for i, part in enumerate(reply.parts) if part.kind != grammar.POLITE]
    if not places:
        return None
    place = source.choice(places)
    words = reply.parts[place].text.split()
    i = source.randrange(len(words))
    tail = words[i][len(words[i].rstrip(".,")) :]
    words[i] = "".join(source.choices(_SYLLABLES, k=source.randint(2, 3))) + tail
    return _replace(reply, place, " ".join(words))


def _rude_line(source: random.Random, facts: Facts, reply: Reply) -> Reply | None:
    place = source.randint(0, len(reply.parts))
    line = Part(grammar.POLITE, source.choice(grammar.RUDE_LINES))
    return Reply((*reply.parts[:place], line, *reply.parts[place:]))


def _missing_part(source: random.Random, facts: Facts, reply: Reply) -> Reply | None:
    places = [i for i, part in enumerate(reply.parts) if part.kind != grammar.POLITE]
    if len(reply.parts) < 2 or not places:
        return None
    place = source.choice(places)
    return _replace(reply, place)


FAULTS: dict[str, Callable[[random.Random, Facts, Reply], Reply | None]] = {
    "wrong name": _wrong("name"),
    "wrong item": _wrong("item"),
    "wrong problem": _wrong("problem"),
    "wrong ask": _wrong("ask"),
    "repeat": _repeat,
    "cut": _cut,
    "invented word": _invented_word,
    "rude line": _rude_line,
    "missing part": _missing_part,
}
"""Each kind of fault, with the function that inserts it; the function returns None if the reply has no place for it."""


def stray_facts(source: random.Random, facts: Facts) -> Facts:
    """Replace one to three of the facts by those of another message, and keep the message itself."""
    other = grammar.make_facts(source)
    strays = source.sample(sorted(_OTHERS), k=source.randint(1, 3))
    return dataclasses.replace(facts, **{fact: getattr(other, fact) for fact in strays})
