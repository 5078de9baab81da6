"""Base classes and types of values in requests and responses."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Wire(BaseModel):
    """A value that crosses the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Identified(Wire):
    """A value with an id, which serves as the cursor of lists."""

    id: str


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("holds a NUL character, which cannot be stored: remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not valid Unicode: remove it") from None
    return text


def check_not_blank(text: str) -> str:
    """Return the text unchanged. Raises ValueError if nothing is in it but whitespace."""
    if not text.strip():
        raise ValueError("is blank: say what to answer, or leave the message out")
    return text


StoredText = Annotated[str, AfterValidator(_storable)]
NonBlankText = Annotated[StoredText, AfterValidator(check_not_blank)]
