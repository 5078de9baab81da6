"""The documentation matches the code: settings, commands, files, links, examples and guarantees."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.support.demo_messages import facts_of, messages_in
from tpo.cli import app
from tpo.settings import Settings

ROOT = Path(__file__).parents[2]
TOP_LEVEL = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DOCUMENTS = [
    *(ROOT / name for name in TOP_LEVEL),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
]
CARDS = sorted((ROOT / "demo").glob("**/*.md"))
BENCHES = sorted((ROOT / "bench").glob("*.py"))
WITH_SETTINGS = [
    *DOCUMENTS,
    *CARDS,
    *(ROOT / name for name in (".env.example", "docker-compose.yml", "Makefile", "Dockerfile")),
]
OTHER_VARIABLES = {"TPO_URL", "TPO_KEY", "TPO_VERSION", "TPO_PUBLISH"}
"""Variables of clients and of Compose, which no process of the server reads."""

BASE_FOLDERS = ("", "tpo", "tpo/backends/local", "tests", "tests/core", "docs", "demo", "examples")
"""Folders that the paths of files in documents are relative to."""
FOREIGN_FILES = {"generation_config.json", "docker-compose.override.yml"}


@pytest.mark.parametrize("document", WITH_SETTINGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_settings_exist(document: Path) -> None:
    named = set(re.findall(r"\bTPO_[A-Z_]*[A-Z]", document.read_text()))
    assert named <= OTHER_VARIABLES | {f"TPO_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_linked_files_exist(document: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", document.read_text()):
        if "://" not in link:
            target = document.parent / link if link else document
            assert target.exists(), link
            assert not anchor or anchor in headings(target), f"{link}#{anchor}"


def headings(document: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.*)", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", [*DOCUMENTS, *CARDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(document: Path) -> None:
    named = (
        set(re.findall(r"`(\w[\w./-]*(?:\.(?:py|md|json|toml|png|txt|yml)|/))`", document.read_text())) - FOREIGN_FILES
    )
    missing = {name for name in named if not any((ROOT / folder / name).exists() for folder in BASE_FOLDERS)}
    assert not missing


@pytest.mark.parametrize("document", [*DOCUMENTS, *CARDS, *BENCHES], ids=lambda p: str(p.relative_to(ROOT)))
def test_named_commands_know_their_options(document: Path) -> None:
    """Check options of `tpo` against its commands, and options of a module against its source."""
    text = document.read_text()
    if document.suffix == ".py":
        text = re.sub(r"[][]", "", ast.get_docstring(ast.parse(text)) or "")
    for words in commands(text):
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if words[0] == "tpo":
            known = options_of(words[1:])
        else:
            module = importlib.util.find_spec(words[2])
            assert module, words
            known = re.findall(r'"(--[a-z-]+)"', source_of(words[2]))
        assert set(options) <= {*known, "--help"}, words


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each call of `tpo`, or of a module of this project, in code blocks and inline code."""
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    lines = [line for language, code in blocks.findall(text) if language in ("", "sh") for line in code.splitlines()]
    lines += re.findall(r"(?:(?<=`)|(?<=^ {4}))[^`\n]+(?=`|$)", blocks.sub("", text), re.MULTILINE)
    for line in lines:
        found = re.search(r"(?:^|[ /`])(tpo|python -m (?:tests|bench|demo|api|worker)[\w.]*)( [^#`]*)?(?:$|[#`])", line)
        if found:
            yield shlex.split(" ".join(word or "" for word in found.groups()))


def options_of(words: list[str]) -> list[str]:
    """Return the options of a command of `tpo`, and fail if there is no such command."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-"):
            assert word in command.commands, f"tpo has no command {word}"
            command = command.commands[word]
    return [option for parameter in command.params for option in parameter.opts]


def source_of(module: str) -> str:
    """Return the source of a module, or of `__main__` of a package."""
    folder = ROOT / module.replace(".", "/")
    return (folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text()


def walk(command: Any) -> Iterator[Any]:
    """Yield a command and all its subcommands."""
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from walk(each)


def test_commands_support_json() -> None:
    found = [command for command in walk(typer.main.get_command(app)) if not hasattr(command, "commands")]
    assert len(found) > 20
    for command in found:
        assert any("--json" in parameter.opts for parameter in command.params), command.name


def test_help_contains_no_brackets() -> None:
    """Check for brackets, which rich would read as markup and not show."""
    for command in walk(typer.main.get_command(app)):
        for text in (command.help, *(getattr(parameter, "help", None) for parameter in command.params)):
            assert "[" not in (text or ""), text


@pytest.mark.parametrize(
    "file",
    [
        *DOCUMENTS,
        *sorted((ROOT / "examples").glob("*.*")),
        ROOT / "api/openapi/examples.py",
        ROOT / "tpo/cli/stack/run.py",
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_example_messages_are_understood(file: Path) -> None:
    """Check that the demo models were trained on the wording of each message that a reader may send to them."""
    assert [each for each in messages_in(file.read_text()) if facts_of(each) is None] == []


def test_messages_are_found() -> None:
    text = """submit("Where is my order?", 1); {"input": "My lamp is now broken. Can I get a quick refund?"}"""
    assert messages_in(text) == ["Where is my order?", "My lamp is now broken. Can I get a quick refund?"]
    assert len(messages_in((ROOT / "docs" / "openai.md").read_text())) == 3
    assert facts_of("My lamp is now broken. Can I get a quick refund?") is None
    found = facts_of("My name is Clara. My lamp is now broken. I need it soon. Can I get a quick refund?")
    assert found
    assert (found.name, found.item, found.problem, found.ask) == ("Clara", "lamp", "broken", "refund")


def test_site_pages_and_pictures_exist() -> None:
    """Check what the site names, so that most mistakes are found without building it."""
    site = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"^ +- .*: (\S+\.md)$", site, re.MULTILINE))
    hooks = (ROOT / "scripts" / "mkdocs_hooks.py").read_text()
    outside = dict(re.findall(r'^    "([\w/.]+)": "(project/[\w.]+)",$', hooks, re.MULTILINE))
    assert outside
    assert all((ROOT / file).exists() for file in outside)
    generated = set(re.findall(r"build/docs/(\w+\.md)", (ROOT / "Makefile").read_text()))
    own = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    numbered = {page for page in own if page.startswith("adr/0")}
    assert named == (own - numbered) | {place for place in outside.values() if place.endswith(".md")} | generated


def test_guarantees_name_existing_tests() -> None:
    table, _, _ = (ROOT / "docs" / "guarantees.md").read_text().partition("\n## ")
    rows = re.findall(r"^\| \*\*.*", table, re.MULTILINE)
    assert rows
    for row in rows:
        named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^ *def {test}\(", source, re.MULTILINE), f"{file} has no {test}"
