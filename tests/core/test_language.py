"""The language of code and documents: standard terms, and no word of the dialect that this project began with."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
]
FOLDERS = (
    *("tpo/core", "tpo/db", "tpo/jobs", "tpo/tenants", "tpo/batches", "worker", "testing", "bench", "migrations"),
    *("examples", "scripts"),
    *("tests/core", "tests/contract", "tests/support"),
)
"""Folders of code that are written in plain terms so far. The others follow; none leaves."""

FORBIDDEN = re.compile(
    r"\b(doorbells?|bells?|rung|anew|for ever|in vain|whose turn|said|told|tells? of|unsaid|beside|courier|parcel)\b",
    re.IGNORECASE,
)
"""Words of the dialect. The glossary of terms to use instead is in CONTRIBUTING.md."""

ALLOWED: dict[str, frozenset[str] | None] = {
    # A map from old names to new ones.
    "docs/adr/0001-names.md": None,
    "tests/core/test_language.py": None,
}
"""Files in which some of them are legitimate; None is all of them."""

RELATIVE_CLAUSE = re.compile(r"(What|Whether|Who|Whose|How|Why|Where|Which|When|Those|That)\b")


def dialect(file: Path) -> list[str]:
    """Return the forbidden words of a file, each with its line."""
    name = str(file.relative_to(ROOT))
    allowed = ALLOWED.get(name, frozenset())
    if allowed is None:
        return []
    return [
        f"{name}:{number}: {found[0]}"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for found in FORBIDDEN.finditer(line)
        if found[0].lower() not in allowed
    ]


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Iterate over the docstrings of a file's modules, classes and functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("folder", FOLDERS)
def test_code_has_no_dialect(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [each for file in files for each in dialect(file)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_document_has_no_dialect(document: Path) -> None:
    assert dialect(document) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_sentences(folder: str) -> None:
    clauses = [
        f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(file)
        if RELATIVE_CLAUSE.match(text)
    ]
    assert clauses == []


def test_forbidden_words_are_found() -> None:
    assert FORBIDDEN.findall("Ring the doorbell anew, as was said; whose turn is it?") == [
        *("doorbell", "anew", "said", "whose turn"),
    ]
