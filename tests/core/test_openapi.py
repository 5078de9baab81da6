"""The OpenAPI document names every operation in the field's terms, so that a client generator makes good names."""

import re
from typing import Any

import pytest

from api.app import create_app
from tpo.settings import Settings

VERBS = ("Cancel", "Check", "Create", "Delete", "Download", "Extend", "Get", "List", "Pause")
MORE_VERBS = ("Resume", "Retry", "Rotate", "Send", "Update", "Upload")


@pytest.fixture(scope="module")
def operations() -> list[dict[str, Any]]:
    document = create_app(Settings()).openapi()
    return [operation for methods in document["paths"].values() for operation in methods.values()]


def test_operation_ids_are_unique_names(operations: list[dict[str, Any]]) -> None:
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids) > 40
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", each) for each in ids)


def test_summaries_are_unique_and_start_with_a_verb(operations: list[dict[str, Any]]) -> None:
    summaries = [operation["summary"] for operation in operations]
    assert len(set(summaries)) == len(summaries)
    assert [each for each in summaries if each.split()[0] not in (*VERBS, *MORE_VERBS)] == []


def test_descriptions_start_with_a_verb(operations: list[dict[str, Any]]) -> None:
    first_words = {operation["description"].split()[0] for operation in operations}
    assert first_words <= {*VERBS, *MORE_VERBS, "Show"}
