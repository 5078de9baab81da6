"""The language of code and documents: standard terms, and no word of the dialect that this project began with."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
    *(
        ROOT / "demo" / name
        for name in ("README.md", "RESULTS.md", "models/policy/README.md", "models/reward/README.md")
    ),
]
FOLDERS = ("api", "bench", "demo", "examples", "migrations", "scripts", "testing", "tests", "tpo", "worker")

FORBIDDEN = re.compile(
    r"\b(?:anew|arenas?|bells?|beside|courier|doorbells?|doorkeeper|for ever|henceforth|in company|in vain|insists?|"
    r"mend(?:s|ed|ing)?|parcel|put back|rung|said|stood|told|unsaid|whence|whoever|whose turn|with company)\b"
    r"|\b(?:asked of|believed|go(?:es|ing)? on|is away|listened to|says of|so many|stands? (?:alone|in)|tells? of)\b",
    re.IGNORECASE,
)
"""Words of the dialect. The glossary of terms to use instead is in CONTRIBUTING.md."""

ALLOWED: dict[str, frozenset[str] | None] = {
    # The parcel of a customer.
    "api/openapi/examples.py": frozenset({"parcel"}),
    # A map from old names to new ones.
    "docs/adr/0001-names.md": None,
    "tests/core/test_language.py": None,
}
"""Files in which some of them are legitimate; None is all of them."""

FORBIDDEN_NAMES = frozenset(
    {
        *("anew", "anybody", "arena", "bell", "beside", "courier", "doorbell", "doorkeeper", "feed", "forget", "hears"),
        *("insist", "look", "news", "parcel", "ring", "room", "rung", "said", "somebody", "stands", "tell", "told"),
        *("vain", "whose"),
    }
)
"""Words that no name of a class, function, parameter, variable or attribute contains, except the allowed names."""

ALLOWED_NAMES = frozenset({"feed_forward"})

RELATIVE_CLAUSE = re.compile(r"(What|Whether|Who|Whose|How|Why|Where|Which|When|Those|That)\b")


def sources(folder: str) -> list[Path]:
    """Return the Python files of a folder that are written in plain terms."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return files


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


def defined_names(file: Path) -> Iterator[tuple[int, str]]:
    """Iterate over the names that a file defines, each with its line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


def words(name: str) -> set[str]:
    """Split a name in snake_case or CamelCase into its words."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Iterate over the docstrings of a file's modules, classes and functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("folder", FOLDERS)
def test_code_has_no_dialect(folder: str) -> None:
    assert [each for file in sources(folder) for each in dialect(file)] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_have_no_dialect(folder: str) -> None:
    assert [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in sources(folder)
        for line, name in defined_names(file)
        if words(name) & FORBIDDEN_NAMES and name not in ALLOWED_NAMES
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_document_has_no_dialect(document: Path) -> None:
    assert dialect(document) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_sentences(folder: str) -> None:
    clauses = [
        f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for file in sources(folder)
        for line, text in docstrings(file)
        if RELATIVE_CLAUSE.match(text)
    ]
    assert clauses == []


def test_forbidden_words_are_found() -> None:
    assert FORBIDDEN.findall("Ring the doorbell anew, as was said; whose turn is it?") == [
        *("doorbell", "anew", "said", "whose turn"),
    ]


def test_words_of_a_name_are_found() -> None:
    assert words("_forgetBell_TOLD2") == {"forget", "bell", "told"}
