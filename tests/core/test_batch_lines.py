"""The lines of a batch's input, as they are cut out of parts and read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpo.batches.lines import RawLine, RefusedLine, split_lines
from tpo.openai.batch_lines import OpenAILines, RequestLine

RESPONSES = "/v1/responses"


def line(**more: Any) -> bytes:
    return json.dumps(
        {"custom_id": "a", "method": "POST", "url": RESPONSES, "body": {"input": "Hello"}, **more}
    ).encode()


def refused(text: bytes | None) -> RefusedLine:
    found = OpenAILines().parse(RawLine(text, 0), RESPONSES)
    assert isinstance(found, RefusedLine)
    return found


@given(
    st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b)),
    st.lists(st.integers(1, 7), min_size=1),
    st.booleans(),
)
def test_lines_do_not_depend_on_the_parts(texts: list[bytes], sizes: list[int], ended: bool) -> None:
    data = b"\n".join(texts) + (b"\n" if ended else b"")
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(parts) % len(sizes)]
        parts.append(data[at : at + size])
        at += size
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    found = list(split_lines(parts, longest=8))
    assert [f.text for f in found] == [e if len(e) <= 8 else None for e in expected]
    assert sum(f.size for f in found) == len(data)


def test_a_line_without_end_is_not_kept() -> None:
    found = list(split_lines((b"x" * 1000 for _ in range(1000)), longest=5000))
    assert found == [RawLine(None, 1_000_000)]
    assert refused(None).custom_id is None


@pytest.mark.parametrize("text", [b"", b" ", b"\r", b"\xef\xbb\xbf", b"\t\r"])
def test_blank(text: bytes) -> None:
    assert RawLine(text, 1).is_blank


@pytest.mark.parametrize("text", [line(), line() + b"\r", b"\xef\xbb\xbf" + line(), b"  " + line()])
def test_reads(text: bytes) -> None:
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
def test_refuses(text: bytes, custom_id: str | None, param: str | None) -> None:
    found = refused(text)
    assert (found.custom_id, found.error.param) == (custom_id, param)


@pytest.mark.parametrize("text", [b"[]", b'"x"', b"5", b"null", b"true"])
def test_what_is_no_object_is_told_in_the_words_of_its_writer(text: bytes) -> None:
    assert str(refused(text).error) == "The line must be a JSON object."
