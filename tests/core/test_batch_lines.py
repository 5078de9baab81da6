"""Input lines of a batch: splitting the chunks of a file into lines, and reading each line."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpo.batches.lines import RawLine, RefusedLine, split_lines
from tpo.openai.batch_lines import OpenAILines, RequestLine

RESPONSES = "/v1/responses"


def line(**more: Any) -> bytes:
    """Return a valid line, with more or other fields."""
    return json.dumps(
        {"custom_id": "a", "method": "POST", "url": RESPONSES, "body": {"input": "Hello"}, **more}
    ).encode()


def refused(text: bytes | None) -> RefusedLine:
    """Parse a line that must be refused."""
    found = OpenAILines().parse(RawLine(text, 0), RESPONSES)
    assert isinstance(found, RefusedLine)
    return found


@given(
    st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b)),
    st.lists(st.integers(1, 7), min_size=1),
    st.booleans(),
)
def test_split_does_not_depend_on_chunk_boundaries(texts: list[bytes], sizes: list[int], ended: bool) -> None:
    data = b"\n".join(texts) + (b"\n" if ended else b"")
    parts: list[bytes] = []
    offset = 0
    while offset < len(data):
        size = sizes[len(parts) % len(sizes)]
        parts.append(data[offset : offset + size])
        offset += size
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    found = list(split_lines(parts, longest=8))
    whole = [line.text for line in found if line.ended]
    assert whole == [each if len(each) <= 8 else None for each in expected]
    assert all(line.text is None for line in found if not line.ended)
    assert sum(line.size for line in found) == len(data)
    for number, line in enumerate(found):
        offset = sum(earlier.size for earlier in found[: number + 1])
        rest = list(split_lines([data[offset:]], longest=8, inside_line=not line.ended))
        assert [more.text for more in rest if more.ended] == [more.text for more in found[number + 1 :] if more.ended]


def test_split_drops_text_of_overlong_line() -> None:
    found = list(split_lines((b"x" * 1000 for _ in range(1000)), longest=5000))
    assert {line.text for line in found} == {None}
    assert [line.ended for line in found] == [False] * (len(found) - 1) + [True]
    assert sum(line.size for line in found) == 1_000_000
    assert max(line.size for line in found) <= 6000, "a caller can stop within the line"
    assert refused(None).custom_id is None


@pytest.mark.parametrize("text", [b"", b" ", b"\r", b"\xef\xbb\xbf", b"\t\r"])
def test_is_blank_accepts_whitespace_and_bom(text: bytes) -> None:
    assert RawLine(text, 1).is_blank


@pytest.mark.parametrize("text", [line(), line() + b"\r", b"\xef\xbb\xbf" + line(), b"  " + line()])
def test_parse_accepts_valid_line(text: bytes) -> None:
    found = OpenAILines().parse(RawLine(text, 0), RESPONSES)
    assert isinstance(found, RequestLine)
    assert found.custom_id == "a"
    assert found.body.submission().input == "Hello"


@pytest.mark.parametrize(
    ("text", "custom_id", "param"),
    [
        (b'{"custom_id": "a"', None, None),
        (b"\xff\xfe", None, None),
        (b"[" * 100_000, None, None),
        (b"[]", None, None),
        (b"NaN", None, None),
        (line(custom_id=1), None, "custom_id"),
        (line(custom_id=""), None, "custom_id"),
        (line(custom_id="\x00"), None, "custom_id"),
        (line(method="GET"), "a", "method"),
        (line(url="/v1/embeddings"), "a", "url"),
        (line(url="/v1/chat/completions"), "a", "url"),
        (line(body=[]), "a", "body"),
        (line(body={}), "a", "input"),
        (line(body={"input": "x", "stream": True}), "a", "stream"),
        (line(body={"input": "x", "stop": 1}), "a", "stop"),
        (line(body={"input": "x", "tpo": {"external_id": "e"}}), "a", "tpo.external_id"),
        (line(more=1), "a", "more"),
        (line(body={"input": "\ud800"}), None, None),
    ],
)
def test_parse_refuses_invalid_line(text: bytes, custom_id: str | None, param: str | None) -> None:
    found = refused(text)
    assert (found.custom_id, found.error.param) == (custom_id, param)


@pytest.mark.parametrize("text", [b"[]", b'"x"', b"5", b"null", b"true"])
def test_parse_refuses_line_that_is_not_an_object(text: bytes) -> None:
    assert str(refused(text).error) == "The line must be a JSON object."
