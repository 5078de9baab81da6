"""Limits on the structure of JSON: what is counted, and which place a refusal names."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpo import json_limits
from tpo.core.errors import InvalidInputError
from tpo.json_limits import MAX_DEPTH, MAX_FIELDS, MAX_ITEMS, InvalidJSONError, check_structure


def refusal(document: Any) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        check_structure(document if isinstance(document, bytes) else json.dumps(document).encode())
    return caught.value


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ([0] * (MAX_ITEMS + 1), None),
        ({"parameters": {"stop": [0] * (MAX_ITEMS + 1)}}, "parameters.stop"),
        ({"a": [{"b": [0] * (MAX_ITEMS + 1)}]}, "a[0].b"),
        ({"a": [0, 1, {"b": dict.fromkeys(map(str, range(MAX_FIELDS + 1)), 0)}]}, "a[2].b"),
        ({str(number): 0 for number in range(MAX_FIELDS + 1)}, None),
        ({"a": [[0] * 100] * 101}, "a[98][99]"),
    ],
    ids=["items", "stop", "nested", "fields", "top fields", "values"],
)
def test_refusal_names_the_place(document: Any, param: str | None) -> None:
    error = refusal(document)
    assert (error.status, error.param) == (422, param)
    assert str(error).startswith(f"{param or 'the body'}: has more than ")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused_as_json(opening: str) -> None:
    check_structure(opening.encode() * MAX_DEPTH)
    error = refusal(opening.encode() * (MAX_DEPTH + 1))
    assert isinstance(error, InvalidJSONError)
    assert error.status == 400


@pytest.mark.parametrize(
    "text", ["," * 5000, "[{" * 5000, '",' * 5000, '\\",' * 5000, "\\" * 5001 + ",", "é,\x00" * 2000, '\\\\",[' * 1000]
)
def test_text_is_not_counted(text: str) -> None:
    for ascii_only in (True, False):
        check_structure(json.dumps({text: text, "more": [text, text]}, ensure_ascii=ascii_only).encode())


@pytest.mark.parametrize("content", [b'"' + b"\\" * 5000, b'"' + b'\\"' * 5000, b'["' + b",[" * 5000, b"]},:" * 5000])
def test_broken_text_is_left_to_the_parser(content: bytes) -> None:
    check_structure(content)


def test_text_without_end_is_read_once() -> None:
    assert len(json_limits._TOKEN.findall(b'"' + b'\\"' * 100_000)) == 1


_VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('",:[]{}\\aé')),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=6),
    max_leaves=30,
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def largest(value: Any, kind: type) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return max([len(inner) if isinstance(value, kind) else 0, *(largest(each, kind) for each in inner)])


@given(_VALUES)
def test_counts_equal_those_of_the_parsed_document(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in (("MAX_ITEMS", 4), ("MAX_FIELDS", 3), ("MAX_DEPTH", 3)):
            patch.setattr(json_limits, name, limit)
        expected = largest(value, list) > 4 or largest(value, dict) > 3 or depth(value) > 3
        try:
            check_structure(json.dumps(value).encode())
        except InvalidInputError:
            assert expected
        else:
            assert not expected
