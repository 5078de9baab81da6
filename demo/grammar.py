"""The demo's domain: a small shop that answers customer messages.

Every text that the tiny models see is generated here, from closed lists and templates: customer messages, replies,
critiques, suggestions and improved replies. A checker parses plain text, so that a model's output can be evaluated.

A reply has up to fourteen qualities. Thirteen are sentences that it may contain, in a fixed order; the last one is that
it contains no rude line. Four facts are copied from the message: the name, the item, its problem and the request.
"""

import functools
import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from demo import unseen
from demo.unseen import words

NAMES = words(
    """Maria Anna James Peter Laura David Sofia Omar Nina Paul Emma Lucas Clara Felix Julia Simon Alice Robert Helen
    Victor Irene Martin Diana Oscar Elena Thomas Grace Henry Carla Daniel Ruth Samuel Olga Marco Lena Adam Rosa Hugo
    Vera Ivan Mona Karl Tina Erik Sara Amir Leila Yuki Hana Kenji Ravi Priya Asha Kofi Chen Jorge Lucia Pablo Tariq
    Fatima"""
)
ITEMS = words(
    """kettle lamp radio toaster speaker clock heater fan printer mixer camera keyboard teapot mug vase mirror bowl
    plate jug pan tray frame chair desk stool shelf table cabinet bench bookcase bed wardrobe basket bottle guitar
    violin drum bicycle helmet scooter suitcase telescope monitor laptop charger ladder hammer mattress carpet
    piano"""
)
PROBLEMS = words(
    """broken late dirty scratched damaged stained faulty wet faded lost defective smelly dusty sticky warped cracked
    dented rusty loose bent"""
)
ASKS = words("refund replacement repair discount voucher pickup return swap credit visit")
NUMBERS = words("two three four five six seven")

SENTENCES: dict[str, tuple[str, ...]] = {
    "greeting": ("Dear {name},", "Hello {name},"),
    "thanks": ("Thank you for your message.", "We are glad that you wrote."),
    "apology": ("We are sorry for the trouble.", "Please accept our apology."),
    "problem": ("I see that your {item} is now {problem}.", "Your {item} is now {problem}, I understand."),
    "answer": ("You will get a quick {ask}.", "Yes, a quick {ask} is approved."),
    "reason": ("The box was too weak.", "Our driver made a mistake."),
    "time": ("It takes {number} days.", "Expect news in {number} days."),
    "step": ("Send us a photo of the {item}.", "Bring the {item} to our shop."),
    "cost": ("There is no charge.", "All costs are ours."),
    "gift": ("A small gift comes with it.", "We add some tea for you."),
    "promise": ("This will not happen again.", "Next time we check twice."),
    "phone": ("Call us on 555 0147.", "Our phone is 555 0147."),
    "closing": ("Kind regards, Harbor Shop.", "Best wishes, Harbor Shop."),
}
"""The sentences of each quality, in the order of a reply."""

ORDER = tuple(SENTENCES)
POLITE = "polite"
QUALITIES = (*ORDER, POLITE)
"""All qualities, in the order of a critique."""

RUDE_LINES = ("This is not our fault.", "Stop bothering us.", "You should be more careful.", "Nobody else complains.")

QUERIES = (
    "My name is {name}. My {item} is now {problem}. {extra}Can I get a quick {ask}?",
    "Hello, I am {name}. The {item} that I bought is now {problem}. {extra}I would like a quick {ask}.",
    "I want a quick {ask}. My {item} is now {problem}. {extra}Best, {name}",
    "{extra}The {item} from your shop is now {problem}. Is a quick {ask} possible? Thanks, {name}",
    "This is {name}. I ordered a {item} and it is now {problem}. {extra}Please arrange a quick {ask}.",
)
EXTRAS = ("It was a gift for my sister.", "I need it soon.", "I like your shop, though.", "I paid a lot for it.")

LACKS = {
    "greeting": "a greeting for {name}",
    "thanks": "thanks",
    "apology": "an apology",
    "problem": "a word that the {item} is now {problem}",
    "answer": "a yes to a quick {ask}",
    "reason": "a reason",
    "time": "a time",
    "step": "a step for the {item}",
    "cost": "the cost",
    "gift": "a gift",
    "promise": "a promise",
    "phone": "a phone number",
    "closing": "a closing",
    POLITE: "a polite tone",
}
"""The phrase of a critique for each quality that a reply lacks."""

SUGGEST = {
    "greeting": "Greet {name}.",
    "thanks": "Say thanks.",
    "apology": "Say sorry.",
    "problem": "Mention that the {item} is now {problem}.",
    "answer": "Say yes to a quick {ask}.",
    "reason": "Give a reason.",
    "time": "Give a time.",
    "step": "Give a step for the {item}.",
    "cost": "Explain the cost.",
    "gift": "Add a gift.",
    "promise": "Make a promise.",
    "phone": "Give a phone number.",
    "closing": "Add a closing.",
    POLITE: "Remove any rude line.",
}
"""The instruction that adds each quality to a reply."""

NO_CHANGE = "Change nothing."
POINTS_OF_A_CRITIQUE = 3


@dataclass(frozen=True)
class Facts:
    """A customer message (`query`) and the facts in it."""

    name: str
    item: str
    problem: str
    ask: str
    query: str

    def fill(self, template: str) -> str:
        """Fill this message's facts into a template."""
        return template.format(name=self.name, item=self.item, problem=self.problem, ask=self.ask)


@dataclass(frozen=True)
class Part:
    """A sentence of a reply; `kind` is a quality, or POLITE for a rude line, which removes that quality."""

    kind: str
    text: str


@dataclass(frozen=True)
class Reply:
    """A reply as a sequence of sentences."""

    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The reply in plain text."""
        return " ".join(part.text for part in self.parts)

    @property
    def missing(self) -> tuple[str, ...]:
        """The qualities that the reply lacks, in the order of QUALITIES."""
        kinds = {part.kind for part in self.parts}
        return tuple(kind for kind in QUALITIES if (kind in kinds) == (kind == POLITE))


@dataclass(frozen=True)
class Critique:
    """The content of a critique: the points that the chosen reply lacks, and one that the rejected reply lacks."""

    lacks: tuple[str, ...]
    rejected_lacks: str | None = None

    @property
    def suggested(self) -> tuple[str, ...]:
        """The qualities to ask for: all points, and politeness if the rejected reply is rude."""
        avoid = (POLITE,) if self.rejected_lacks == POLITE and POLITE not in self.lacks else ()
        return self.lacks + avoid


def is_held_out(name: str, item: str) -> bool:
    """Return True if a pair of name and item is excluded from training. One in eight is."""
    return (NAMES.index(name) * 7 + ITEMS.index(item) * 5) % 8 == 0


def make_facts(source: random.Random, held_out: bool = False) -> Facts:
    """Make a customer message whose pair of name and item belongs to the training set or to the held-out set."""
    while True:
        name, item = source.choice(NAMES), source.choice(ITEMS)
        if is_held_out(name, item) == held_out:
            break
    problem, ask = source.choice(PROBLEMS), source.choice(ASKS)
    extra = source.choice(EXTRAS) + " " if source.random() < 0.4 else ""
    query = source.choice(QUERIES).format(name=name, item=item, problem=problem, ask=ask, extra=extra)
    return Facts(name, item, problem, ask, query)


def make_unseen_facts(source: random.Random) -> Facts:
    """Make a customer message in words and phrasings that do not occur in training."""
    name, item = source.choice(unseen.NAMES), source.choice(unseen.ITEMS)
    problem, ask = source.choice(unseen.PROBLEMS), source.choice(unseen.ASKS)
    extra = source.choice(unseen.EXTRAS) + " " if source.random() < 0.4 else ""
    query = source.choice(unseen.QUERIES).format(name=name, item=item, problem=problem, ask=ask, extra=extra)
    return Facts(name, item, problem, ask, query)


def make_sentence(source: random.Random, kind: str, facts: Facts) -> str:
    """Make a random sentence of a quality, with the facts filled in."""
    return facts.fill(source.choice(SENTENCES[kind]).replace("{number}", source.choice(NUMBERS)))


def make_reply(source: random.Random, facts: Facts, share: float = 0.33, rude: float = 0.4) -> Reply:
    """Make a reply that contains each sentence with probability `share` and a rude line with probability `rude`.

    A reply without any sentence always has a rude line.
    """
    parts = [Part(kind, make_sentence(source, kind, facts)) for kind in ORDER if source.random() < share]
    if not parts or source.random() < rude:
        first = 1 if parts and parts[0].kind == "greeting" else 0
        last = len(parts) - (1 if parts and parts[-1].kind == "closing" else 0)
        parts.insert(source.randint(min(first, last), last), Part(POLITE, source.choice(RUDE_LINES)))
    return Reply(tuple(parts))


def criticise(chosen: Reply, rejected: Reply | None = None) -> Critique:
    """Make a critique: the first three missing qualities of the chosen reply, and the rejected reply's worst fault."""
    if rejected is None:
        return Critique(chosen.missing[:POINTS_OF_A_CRITIQUE])
    faults = rejected.missing
    worst = POLITE if POLITE in faults else faults[0] if faults else None
    return Critique(chosen.missing[:POINTS_OF_A_CRITIQUE], worst)


def join(phrases: Sequence[str]) -> str:
    """Join phrases to an English list."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def say_lacks(kinds: Sequence[str], facts: Facts) -> str:
    """Write the sentence of a critique about the chosen reply."""
    phrases = [facts.fill(LACKS[kind]) for kind in kinds]
    return f"The chosen reply lacks {join(phrases) if phrases else 'nothing'}."


def critique_text(critique: Critique, facts: Facts, compared: bool) -> str:
    """Write a critique; `compared` adds the sentence about the rejected reply."""
    text = say_lacks(critique.lacks, facts)
    if compared:
        fault = facts.fill(LACKS[critique.rejected_lacks]) if critique.rejected_lacks else "nothing"
        text += f" The rejected reply lacks {fault}."
    return text


def suggestions_text(kinds: Iterable[str], facts: Facts) -> str:
    """Write the suggestions, one for each requested quality."""
    return " ".join(facts.fill(SUGGEST[kind]) for kind in kinds) or NO_CHANGE


def apply(source: random.Random, facts: Facts, chosen: Reply, kinds: Iterable[str]) -> Reply:
    """Return the chosen reply with the suggested qualities added, each at its place, and nothing else changed."""
    wanted = set(kinds)
    parts = [part for part in chosen.parts if part.kind != POLITE or POLITE not in wanted]
    present = {part.kind for part in parts}
    for kind in ORDER:
        if kind in wanted and kind not in present:
            before = [i for i, part in enumerate(parts) if part.kind != POLITE and place(part.kind) < place(kind)]
            parts.insert(before[-1] + 1 if before else 0, Part(kind, make_sentence(source, kind, facts)))
    return Reply(tuple(parts) or chosen.parts)


def place(kind: str) -> int:
    """Return the position of a quality's sentence in the order of a reply."""
    return ORDER.index(kind)


@dataclass(frozen=True)
class Findings:
    """The checker's result for a reply: the qualities that it has, and its faults."""

    met: frozenset[str]
    wrong: tuple[str, ...]
    repeats: int
    rude: int
    unknown: tuple[str, ...]

    @property
    def value(self) -> float:
        """The value of the reply: one for each quality that it has, minus one for each fault.

        The first rude line is not counted again: it already costs the quality POLITE.
        """
        return float(len(self.met) - len(self.wrong) - self.repeats - max(0, self.rude - 1) - len(self.unknown))


_LISTS = {
    "name": NAMES + unseen.NAMES,
    "item": ITEMS + unseen.ITEMS,
    "problem": PROBLEMS + unseen.PROBLEMS,
    "ask": ASKS + unseen.ASKS,
    "number": NUMBERS,
}


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for fact, values in _LISTS.items():
        text = text.replace(re.escape("{" + fact + "}"), f"(?P<{fact}>{'|'.join(values)})")
    return re.compile(text)


_PATTERNS = [(kind, _pattern(template)) for kind, templates in SENTENCES.items() for template in templates]
_PATTERNS += [(POLITE, _pattern(line)) for line in RUDE_LINES]
_FULL_STOP = re.compile(r"[.!?](?=\s|$)")


@dataclass(frozen=True)
class Sentence:
    """A sentence as the checker parses it; `kind` is None if no template matches."""

    kind: str | None
    text: str
    stated: tuple[tuple[str, str], ...] = ()

    def wrong(self, facts: Facts) -> tuple[str, ...]:
        """Return the facts in which the sentence differs from the message."""
        return tuple(fact for fact, value in self.stated if getattr(facts, fact) != value)


@functools.lru_cache(maxsize=100_000)
def read_sentences(text: str) -> tuple[Sentence, ...]:
    """Parse the sentences of a text, in order. Text that matches no template extends to the next full stop."""
    sentences: list[Sentence] = []
    text = text.strip()
    position = 0
    while position < len(text):
        sentence, position = _read_sentence(text, position)
        sentences.append(sentence)
        while position < len(text) and text[position].isspace():
            position += 1
    return tuple(sentences)


def _read_sentence(text: str, position: int) -> tuple[Sentence, int]:
    for kind, pattern in _PATTERNS:
        match = pattern.match(text, position)
        if match and (match.end() == len(text) or text[match.end()].isspace()):
            stated = tuple((fact, value) for fact, value in match.groupdict().items() if fact != "number")
            return Sentence(kind, match.group(), stated), match.end()
    end = _FULL_STOP.search(text, position)
    position_after = end.end() if end else len(text)
    return Sentence(None, text[position:position_after]), position_after


def check(text: str, facts: Facts) -> Findings:
    """Find the qualities and the faults of a reply in plain text."""
    return check_sentences(read_sentences(text), facts)


def check_sentences(sentences: Iterable[Sentence], facts: Facts) -> Findings:
    """Find the qualities and the faults of a parsed reply."""
    met: set[str] = set()
    wrong: list[str] = []
    unknown: list[str] = []
    repeats = rude = 0
    for sentence in sentences:
        errors = sentence.wrong(facts)
        wrong += errors
        if sentence.kind is None:
            unknown.append(sentence.text)
        elif sentence.kind == POLITE:
            rude += 1
        elif sentence.kind in met:
            repeats += 1
        elif not errors:
            met.add(sentence.kind)
    if not rude:
        met.add(POLITE)
    return Findings(frozenset(met), tuple(wrong), repeats, rude, tuple(unknown))


@functools.lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """Return every word that a reply of this grammar can contain."""
    templates = itertools.chain(*SENTENCES.values(), RUDE_LINES)
    words = set(re.findall(r"\w+", " ".join(re.sub(r"\{\w+\}", "", template) for template in templates)))
    return frozenset(words.union(*_LISTS.values()))


def invented_words(text: str) -> list[str]:
    """Return the words of a text that no reply of this grammar can contain."""
    return [word for word in re.findall(r"\w+", text) if word not in known_words()]
