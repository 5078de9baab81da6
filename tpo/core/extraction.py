"""Extract the answer from a sample, or give the reason why it has none."""

from tpo.core.ports import Text
from tpo.core.prompts import PromptSet
from tpo.core.state import PolicyCall, Unusable


def extract_answer(prompts: PromptSet, kind: PolicyCall, sample: Text) -> tuple[str, Unusable | None]:
    """Return a sample's answer and None, or its text and the reason why it is unusable.

    A first sample is its own answer. The answer of an update is the text between the last pair of answer tags.
    """
    cut_off: Unusable | None = "cut_off" if sample.finish_reason == "length" else None
    if not sample.text.strip():
        return "", cut_off or "empty"
    if kind == "sample":
        return sample.text.strip(), cut_off
    if cut_off and prompts.is_unfinished(sample.text):
        return sample.text, cut_off
    if answer := prompts.extract(sample.text):
        return answer, None
    return sample.text, cut_off or "no_answer_tags"


def storable(text: str) -> str:
    """Replace characters that PostgreSQL or UTF-8 cannot store: NUL and lone surrogates."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")
