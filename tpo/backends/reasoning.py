"""Separate the reasoning of a thinking model from its answer."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def split_reasoning(text: str, *, opened: bool | None = None) -> tuple[str, str]:
    """Return the answer in a text, and its reasoning.

    `opened`: True if the chat template has opened the reasoning, so that the text contains only its closing tag; None
    if that is unknown. If the reasoning never ends, the answer is empty.
    """
    if opened or text.lstrip().startswith(THINK_OPEN):
        reasoning, end, answer = text.rpartition(THINK_CLOSE)
        return (answer.lstrip(), reasoning) if end else ("", text)
    if opened is None:
        reasoning, end, answer = text.partition(THINK_CLOSE)
        if end and THINK_OPEN not in reasoning:
            return answer.lstrip(), reasoning
    return text, ""
