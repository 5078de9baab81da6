"""Golden renderings of the shipped prompt sets; `python -m tests.support.renderings` rewrites them."""

from pathlib import Path

from tpo.core.prompts import STEPS, Step, load, names

FOLDER = Path(__file__).parents[1] / "data" / "prompts"
TEXTS = {
    "query": "How do I boil an egg?",
    "chosen": "Boil it for eight minutes.",
    "rejected": "Eggs are healthy.",
    "critique": "The chosen response names a time; the rejected one does not.",
    "gradient": "Say how much water to take.",
}
_KNOWN: dict[Step, tuple[str, ...]] = {
    "critique": ("query", "chosen", "rejected"),
    "gradient": ("query", "chosen", "rejected", "critique"),
    "update": ("query", "chosen", "rejected", "critique", "gradient"),
}


def rendering(name: str) -> str:
    """Render every step of a prompt set, in both modes."""
    sections = []
    for mode in ("tpo", "revision"):
        for step in STEPS:
            texts = {slot: TEXTS[slot] for slot in _KNOWN[step] if mode == "tpo" or slot != "rejected"}
            turns = "\n\n".join(f"[{role}]\n{content}" for role, content in load(name).render(step, texts))
            sections.append(f"======== {mode}: {step}\n{turns}\n")
    return "\n".join(sections)


def golden(name: str) -> Path:
    """Return the file with the golden rendering of a prompt set."""
    return FOLDER / f"{name}.txt"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in names():
        golden(each).write_text(rendering(each), encoding="utf-8")
